"""`/v1/messages` and its `count_tokens`: requests of the Anthropic interface, and answers as it writes them."""

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from ..asks import Ask, Asker, ToolUse
from .fields import LONGEST_STOP, MOST_STOPS, MOST_TOOLS, NAME, WHOLE, Sampled, Timeout, Wire

BILLING_LINE = re.compile(r"\A\s*x-anthropic-billing-header:[^\n]*(?:\n|\Z)")
"""Claude Code's first system block. It changes with each request, so that nothing kept would match the prompt."""
CHOICES: dict[str, Literal["auto", "none", "required", "named"]] = {
    "auto": "auto",
    "none": "none",
    "any": "required",
    "tool": "named",
}


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

    max_tokens: Annotated[int, Field(ge=1), WHOLE]
    stream: bool | None = None
    stop_sequences: (
        Annotated[list[Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]], Field(max_length=MOST_STOPS)]
        | None
    ) = None
    temperature: Annotated[float | None, Field(ge=0, le=1)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1), WHOLE] = None
    metadata: Metadata | None = None
    timeout: Timeout = None

    def ask(self, asker: Asker, *, defaults: Mapping[str, float], owner: str) -> Ask:
        """What is asked.

        Raises:
            ValueError: if a value is out of range or the template refuses the messages.
        """
        sampled = Sampled(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences or None,
            timeout=self.timeout,
        )
        last = self.messages[-1]
        return asker.chat(
            self.shown(),
            sampled.limits(sampled.sampling(defaults), self.max_tokens, owner),
            use=self.use,
            settings=self.settings,
            is_continued=last.role == "assistant",
        )
