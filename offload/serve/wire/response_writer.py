"""Answers of `/v1/responses`: items that grow through events, and the whole response."""

import time
from collections.abc import Mapping
from typing import Any

from ..answers import Called, Delta, Ended, Said


class ResponsesWriter:
    """Writes one answer as items: reasoning, message, calls.

    Args:
        request_id: the answer's id.
        model: name that the client knows the model by.
        echoed: fields of the request that the response repeats.
    """

    def __init__(self, request_id: str, model: str, echoed: Mapping[str, Any]) -> None:
        self._id, self._sequence = request_id, 0
        self._head = {"id": f"resp_{request_id}", "object": "response", "created_at": int(time.time()), "model": model}
        self._echoed = dict(echoed)
        self._items: list[dict[str, Any]] = []
        self._text = ""

    def begin(self) -> list[dict[str, Any]]:
        """The first events."""
        response = self._response("in_progress")
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The events that a delta makes."""
        if isinstance(delta, Said):
            return self._said(delta) if delta.text else []
        if isinstance(delta, Called):
            return [*self._close(), *self._called(delta)]
        events = self._close()
        status = "incomplete" if delta.reason in ("length", "timeout") else "completed"
        return [*events, self._event(f"response.{status}", response=self._response(status, delta))]

    def end(self) -> list[dict[str, Any]]:
        """Nothing: the response's own end is the last event."""
        return []

    def whole(self, answers: list[list[Delta]]) -> dict[str, Any]:
        """The answer as one object."""
        events = [event for delta in answers[0] for event in self.chunks(0, delta)]
        response: dict[str, Any] = events[-1]["response"]
        return response

    def failed(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The event of an answer that failed after it had begun.

        Args:
            body: the error, as OpenAI writes it.
        """
        error = {"code": body["error"]["code"] or "server_error", "message": body["error"]["message"]}
        return self._event("response.failed", response={**self._response("failed"), "error": error})

    def _said(self, said: Said) -> list[dict[str, Any]]:
        is_text = said.channel == "content"
        kind = "message" if is_text else "reasoning"
        events = []
        if not self._is_open or self._items[-1]["type"] != kind:
            events = [*self._close(), *self._open_item(kind)]
        self._text += said.text
        name = "response.output_text.delta" if is_text else "response.reasoning_text.delta"
        more: dict[str, Any] = {"logprobs": []} if is_text else {}
        return [*events, self._event(name, **self._place(), delta=said.text, **more)]

    def _called(self, call: Called) -> list[dict[str, Any]]:
        item = {
            "id": f"fc_{self._id}_{call.index}",
            "type": "function_call",
            "call_id": call.call_id,
            "name": call.name,
        }
        place = {"item_id": item["id"], "output_index": len(self._items)}
        done = {**item, "arguments": call.arguments, "status": "completed"}
        self._items.append(done)
        index = place["output_index"]
        arguments = call.arguments
        return [
            self._event(
                "response.output_item.added",
                output_index=index,
                item={**item, "arguments": "", "status": "in_progress"},
            ),
            self._event("response.function_call_arguments.delta", **place, delta=arguments),
            self._event("response.function_call_arguments.done", **place, name=call.name, arguments=arguments),
            self._event("response.output_item.done", output_index=index, item=done),
        ]

    def _open_item(self, kind: str) -> list[dict[str, Any]]:
        prefix = "msg" if kind == "message" else "rs"
        more: dict[str, Any] = {"role": "assistant"} if kind == "message" else {"summary": []}
        item = {"id": f"{prefix}_{self._id}_{len(self._items)}", "type": kind, **more, "content": []}
        self._items.append({**item, "status": "in_progress"})
        self._text = ""
        index = len(self._items) - 1
        return [
            self._event("response.output_item.added", output_index=index, item=self._items[-1]),
            self._event("response.content_part.added", **self._place(), part=_part(kind, "")),
        ]

    def _close(self) -> list[dict[str, Any]]:
        """The events that end the open item."""
        if not self._is_open:
            return []
        item = self._items[-1]
        kind, place, part = item["type"], self._place(), _part(item["type"], self._text)
        self._items[-1] = {**item, "content": [part], "status": "completed"}
        name = "response.output_text.done" if kind == "message" else "response.reasoning_text.done"
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        return [
            self._event(name, **place, text=self._text, **more),
            self._event("response.content_part.done", **place, part=part),
            self._event("response.output_item.done", output_index=place["output_index"], item=self._items[-1]),
        ]

    @property
    def _is_open(self) -> bool:
        return bool(self._items) and self._items[-1]["status"] == "in_progress"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1, "content_index": 0}

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event

    def _response(self, status: str, ended: Ended | None = None) -> dict[str, Any]:
        return {
            **self._head,
            **self._echoed,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "metadata": {},
            "output": list(self._items),
            "usage": None if ended is None else _usage(ended),
        }


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(ended: Ended) -> dict[str, Any]:
    usage = ended.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": ended.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
