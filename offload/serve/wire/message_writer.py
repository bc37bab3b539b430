"""Answers of `/v1/messages`: content blocks that grow through events, and the whole message."""

import json
from typing import Any

from ..answers import Called, Delta, Ended, Said

STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "timeout": "max_tokens", "tool_calls": "tool_use"}


class MessagesWriter:
    """Writes one answer as content blocks: reasoning, text, calls.

    Args:
        request_id: the answer's id.
        model: name that the client knows the model by.
        prompt_tokens: tokens of the prompt.
    """

    def __init__(self, request_id: str, model: str, prompt_tokens: int) -> None:
        self._id, self._model, self._prompt_tokens = f"msg_{request_id}", model, prompt_tokens
        self._index = -1
        self._open = ""
        self._ended: Ended | None = None

    def begin(self) -> list[dict[str, Any]]:
        """The first event, with the message that will grow."""
        usage = {"input_tokens": self._prompt_tokens, "output_tokens": 0}
        return [{"type": "message_start", "message": self._message([], None, None, usage)}]

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The events that a delta makes."""
        if isinstance(delta, Said):
            return self._said(delta) if delta.text else []
        if isinstance(delta, Called):
            block = {"type": "tool_use", "id": _tool_id(delta), "name": delta.name, "input": {}}
            partial = {"type": "input_json_delta", "partial_json": delta.arguments}
            return [*self._switch("tool_use", block), self._delta(partial), *self._switch("", None)]
        self._ended = delta
        closing = self._switch("", None)
        changed = {"stop_reason": stop_reason(delta), "stop_sequence": delta.stop_string}
        return [*closing, {"type": "message_delta", "delta": changed, "usage": _usage(delta)}]

    def end(self) -> list[dict[str, Any]]:
        """The last event."""
        return [{"type": "message_stop"}]

    def whole(self, answers: list[list[Delta]]) -> dict[str, Any]:
        """The answer as one object."""
        blocks: list[dict[str, Any]] = []
        ended: Ended | None = None
        for delta in answers[0]:
            if isinstance(delta, Called):
                arguments = _object(delta.arguments)
                blocks.append({"type": "tool_use", "id": _tool_id(delta), "name": delta.name, "input": arguments})
            elif isinstance(delta, Said):
                kind, field = _kind(delta)
                if delta.text and blocks and blocks[-1]["type"] == kind:
                    blocks[-1][field] += delta.text
                elif delta.text:
                    blocks.append({**_empty(kind), field: delta.text})
            else:
                ended = delta
        assert ended is not None
        return self._message(blocks, stop_reason(ended), ended.stop_string, _usage(ended))

    def _said(self, said: Said) -> list[dict[str, Any]]:
        kind, field = _kind(said)
        opening = [] if self._open == kind else self._switch(kind, _empty(kind))
        return [*opening, self._delta({"type": f"{kind}_delta", field: said.text})]

    def _switch(self, kind: str, block: dict[str, Any] | None) -> list[dict[str, Any]]:
        """Close the open block, and open another."""
        events = []
        if self._open:
            if self._open == "thinking":
                events.append(self._delta({"type": "signature_delta", "signature": ""}))
            events.append({"type": "content_block_stop", "index": self._index})
        self._open = kind
        if block is not None:
            self._index += 1
            events.append({"type": "content_block_start", "index": self._index, "content_block": block})
        return events

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, stop: str | None, usage: dict[str, int]
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": usage,
        }


def stop_reason(ended: Ended) -> str:
    """Why an answer ended, in Anthropic's words."""
    if ended.stop_string is not None:
        return "stop_sequence"
    return STOP_REASONS.get(ended.reason, "end_turn")


def _kind(said: Said) -> tuple[str, str]:
    return ("text", "text") if said.channel == "content" else ("thinking", "thinking")


def _empty(kind: str) -> dict[str, Any]:
    return {"type": "text", "text": ""} if kind == "text" else {"type": "thinking", "thinking": "", "signature": ""}


def _tool_id(call: Called) -> str:
    return call.call_id.replace("call_", "toolu_", 1)


def _object(arguments: str) -> dict[str, Any]:
    try:
        found = json.loads(arguments)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _usage(ended: Ended) -> dict[str, int]:
    """Tokens; those of the prompt that were kept are counted apart, as Anthropic does."""
    usage = ended.usage
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
