"""`/v1/messages` and its `count_tokens`: requests of the Anthropic interface, and answers as it writes them."""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ..answers import Called, Delta, Ended, Said
from ..asks import Ask, Asker, ToolUse
from .fields import LONGEST_STOP, MOST_STOPS, MOST_TOOLS, NAME, Sampled, Wire

BILLING_LINE = re.compile(r"\A\s*x-anthropic-billing-header:[^\n]*(?:\n|\Z)")
"""Claude Code's first system block. It changes with each request, so that nothing kept would match the prompt."""
CHOICES: dict[str, Literal["auto", "none", "required", "named"]] = {
    "auto": "auto",
    "none": "none",
    "any": "required",
    "tool": "named",
}
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Block(Wire):
    """A part of a message: text, reasoning, a call, or what a call gave."""

    type: Literal["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]
    text: str = ""
    thinking: str = ""
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[Block] | None" = None
    is_error: bool | None = None

    @property
    def plain(self) -> str:
        """The text of a result."""
        if isinstance(self.content, list):
            return "\n".join(block.text for block in self.content if block.type == "text")
        return self.content or ""


class Turn(Wire):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]

    def shown(self) -> list[dict[str, Any]]:
        """The messages as templates know them; results of calls are messages of their own."""
        blocks = [Block(type="text", text=self.content)] if isinstance(self.content, str) else self.content
        text = "\n".join(block.text for block in blocks if block.type == "text")
        results = [
            {"role": "tool", "tool_call_id": block.tool_use_id, "content": block.plain}
            for block in blocks
            if block.type == "tool_result"
        ]
        calls = [_call(block) for block in blocks if block.type == "tool_use"]
        thoughts = "\n".join(block.thinking for block in blocks if block.type == "thinking")
        message: dict[str, Any] = {"role": self.role, "content": text}
        if calls:
            message["tool_calls"] = calls
        if thoughts:
            message["reasoning_content"] = thoughts
        return [*results, *([message] if text or calls or not results else [])]


def _call(block: Block) -> dict[str, Any]:
    function = {"name": block.name or "", "arguments": json.dumps(block.input or {}, ensure_ascii=False)}
    return {"id": block.id, "type": "function", "function": function}


class AnthropicTool(Wire):
    """A tool; those that Anthropic's own servers run are not known."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    input_schema: dict[str, Any]


class AnthropicChoice(Wire):
    """Which tools may be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Wire):
    """Whether the model reasons before it answers."""

    type: Literal["enabled", "disabled", "adaptive"]


class Metadata(Wire):
    user_id: str | None = None


class CountRequest(Wire):
    """A request of `/v1/messages/count_tokens`."""

    model: str | None = None
    messages: Annotated[list[Turn], Field(min_length=1)]
    system: str | list[Block] | None = None
    tools: Annotated[list[AnthropicTool] | None, Field(max_length=MOST_TOOLS)] = None
    tool_choice: AnthropicChoice | None = None
    thinking: Thinking | None = None

    def shown(self) -> list[dict[str, Any]]:
        """The conversation as templates know it; system messages stay where they are."""
        blocks = [self.system] if isinstance(self.system, str) else [block.text for block in self.system or ()]
        system = "\n".join(text for block in blocks if (text := BILLING_LINE.sub("", block)))
        first = [{"role": "system", "content": system}] if system else []
        return [*first, *(message for turn in self.messages for message in turn.shown())]

    @property
    def use(self) -> ToolUse:
        """Tools, in the form of OpenAI."""
        tools = tuple(
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description or "",
                    "parameters": tool.input_schema,
                },
            }
            for tool in self.tools or ()
        )
        choice = self.tool_choice
        if choice is None:
            return ToolUse(tools=tools)
        is_parallel = not choice.disable_parallel_tool_use
        return ToolUse(tools=tools, choice=CHOICES[choice.type], name=choice.name or "", is_parallel=is_parallel)

    @property
    def settings(self) -> dict[str, Any]:
        """Variables of the template."""
        return {} if self.thinking is None else {"enable_thinking": self.thinking.type != "disabled"}

    def count(self, asker: Asker) -> int:
        """Tokens of the prompt.

        Raises:
            ValueError: if the template refuses the messages.
        """
        return len(asker.conversations.render(self.shown(), tools=self.use.tools, settings=self.settings))


class MessagesRequest(CountRequest):
    """A request of `/v1/messages`."""

    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    stop_sequences: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]], Field(max_length=MOST_STOPS)]
        | None
    ) = None
    temperature: Annotated[float | None, Field(ge=0, le=1)] = None
    top_p: float | None = None
    top_k: int | None = None
    metadata: Metadata | None = None

    def ask(self, asker: Asker, *, defaults: Mapping[str, float], owner: str) -> Ask:
        """What is asked.

        Raises:
            ValueError: if a value is out of range or the template refuses the messages.
        """
        sampled = Sampled(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, stop=self.stop_sequences or None
        )
        last = self.messages[-1]
        return asker.chat(
            self.shown(),
            sampled.limits(sampled.sampling(defaults), self.max_tokens, owner),
            use=self.use,
            settings=self.settings,
            is_continued=last.role == "assistant",
        )


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
