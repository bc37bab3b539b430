"""`/v1/responses`: requests of OpenAI's newer interface. Nothing is stored: each request brings its conversation."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..asks import Ask, Asker, ToolUse
from .fields import MOST_TOOLS, NAME, WHOLE, NamedFunction, Sampled, Timeout, Wire, json_grammar


class InputPart(Wire):
    """A part of a message; only text is known."""

    type: Literal["input_text", "output_text", "text", "refusal", "summary_text", "reasoning_text"]
    text: str = ""


class Item(Wire):
    """A message, a call, what a call gave, or an earlier reasoning."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[InputPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputPart] | None = None

    def shown(self) -> dict[str, Any] | None:
        """The message as templates know it; None for what they do not show."""
        if self.type == "function_call":
            function = {"name": self.name or "", "arguments": self.arguments or "{}"}
            call = {"id": self.call_id, "type": "function", "function": function}
            return {"role": "assistant", "content": "", "tool_calls": [call]}
        if self.type == "function_call_output":
            return {"role": "tool", "tool_call_id": self.call_id, "content": _text(self.output)}
        if self.type == "reasoning":
            return None
        return {"role": self.role or "user", "content": _text(self.content)}


def _text(content: str | list[InputPart] | None) -> str:
    return "\n".join(part.text for part in content) if isinstance(content, list) else content or ""


class FunctionTool(Wire):
    """A function that the model may call."""

    type: str = "function"
    name: Annotated[str | None, Field(pattern=NAME)] = None
    description: str | None = None
    parameters: dict[str, Any] | None = None


class NamedChoice(NamedFunction):
    """The one tool to call."""

    type: Literal["function"] = "function"


class TextFormat(Wire):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class TextOptions(Wire):
    format: TextFormat | None = None


class Reasoning(Wire):
    effort: str | None = None


class ResponsesRequest(Wire):
    """A request of `/v1/responses`."""

    model: str | None = None
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    tools: Annotated[list[FunctionTool] | None, Field(max_length=MOST_TOOLS)] = None
    tool_choice: Literal["auto", "none", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1), WHOLE] = None
    temperature: Annotated[float | None, Field(ge=0, le=100)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    stream: bool | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    timeout: Timeout = None

    @model_validator(mode="after")
    def _expect_stateless(self) -> "ResponsesRequest":
        if self.previous_response_id is not None:
            raise ValueError("previous_response_id: this server stores no responses; send the whole conversation")
        if self.background:
            raise ValueError("background: this server stores no responses; stream this one")
        return self

    def shown(self) -> list[dict[str, Any]]:
        """The conversation as templates know it; calls that follow each other are of one message."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            message = item.shown()
            if message is None:
                continue
            last = messages[-1] if messages else {}
            if item.type == "function_call" and last.get("role") == "assistant":
                last["tool_calls"] = [*last.get("tool_calls", ()), *message["tool_calls"]]
            else:
                messages.append(message)
        return messages

    @property
    def use(self) -> ToolUse:
        """Functions among the tools, in the form of chat completions; tools of OpenAI's servers are left out."""
        tools = tuple(
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.parameters},
            }
            for tool in self.tools or ()
            if tool.type == "function" and tool.name
        )
        if isinstance(self.tool_choice, NamedChoice):
            return ToolUse(tools=tools, choice="named", name=self.tool_choice.name)
        return ToolUse(
            tools=tools, choice=self.tool_choice or "auto", is_parallel=self.parallel_tool_calls is not False
        )

    def ask(self, asker: Asker, *, defaults: Mapping[str, float], owner: str) -> Ask:
        """What is asked.

        Raises:
            ValueError: if a value is out of range or the template refuses the messages.
        """
        sampled = Sampled(temperature=self.temperature, top_p=self.top_p, timeout=self.timeout)
        form = self.text.format if self.text is not None else None
        effort = None if self.reasoning is None else self.reasoning.effort
        return asker.chat(
            self.shown(),
            sampled.limits(sampled.sampling(defaults), self.max_output_tokens, owner),
            use=self.use,
            grammar=None if form is None else json_grammar(form.type, form.schema_),
            settings={} if effort is None else {"reasoning_effort": effort},
        )

    def echoed(self) -> dict[str, Any]:
        """Fields of the request that a response repeats."""
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tool_choice": json.loads(self.model_dump_json(include={"tool_choice"}))["tool_choice"] or "auto",
            "tools": [tool.model_dump() for tool in self.tools or ()],
        }
