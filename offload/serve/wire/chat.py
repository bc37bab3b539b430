"""`/v1/chat/completions`: the request, the whole answer, and the chunks of a stream."""

import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ...engine.events import Position, TokenEvent
from ..answers import Called, Delta, Ended, Said
from ..asks import Ask, Asker
from .fields import (
    MOST_ANSWERS,
    MOST_TOOLS,
    WHOLE,
    NamedTool,
    ResponseFormat,
    Sampled,
    StreamOptions,
    Tool,
    Wire,
    tool_use,
)
from .usage import timings_of, usage_of

Spell = Callable[[TokenEvent], dict[str, Any]]


class TextPart(Wire):
    """A part of a message; only text is known."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str = ""


class CalledFunction(Wire):
    name: str
    arguments: str = "{}"


class CallOfTool(Wire):
    """A call that the assistant made in an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Wire):
    """A message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[CallOfTool] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def shown(self) -> dict[str, Any]:
        """The message as templates know it."""
        message = self.model_dump(exclude_none=True, exclude={"reasoning"})
        if self.reasoning_content is None and self.reasoning:
            message["reasoning_content"] = self.reasoning
        for part in message["content"] if isinstance(self.content, list) else ():
            part["type"] = "text"
        return message


class ChatRequest(Sampled):
    """A request of `/v1/chat/completions`."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int | None, Field(ge=1), WHOLE] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1), WHOLE] = None
    n: Annotated[int | None, Field(ge=1, le=MOST_ANSWERS), WHOLE] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=20), WHOLE] = None
    tools: Annotated[list[Tool] | None, Field(max_length=MOST_TOOLS)] = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    timings: bool | None = None
    timings_per_token: bool | None = Field(default=None, description="llama-server's name of timings.")
    return_progress: bool | None = None
    modalities: list[str] | None = None
    functions: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _expect_text(self) -> "ChatRequest":
        if self.modalities not in (None, ["text"]):
            raise ValueError("modalities: this server writes text only")
        if self.functions:
            raise ValueError("functions: this old field is not supported; use tools")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: set logprobs to true as well")
        if self.add_generation_prompt and self.continue_final_message:
            raise ValueError("add_generation_prompt: cannot be true together with continue_final_message")
        return self

    def ask(self, asker: Asker, *, defaults: Mapping[str, float], owner: str) -> Ask:
        """What is asked; takes as long as the template and the tokenizer.

        Raises:
            ValueError: if a value is out of range or the template refuses the messages.
        """
        settings = dict(self.chat_template_kwargs or {})
        if self.reasoning_effort is not None:
            settings.setdefault("reasoning_effort", self.reasoning_effort)
        top = (self.top_logprobs or 0) if self.logprobs else None
        is_continued = self.continue_final_message
        if is_continued is None:
            last = self.messages[-1]
            is_continued = last.role == "assistant" and not last.tool_calls and not self.add_generation_prompt
        return asker.chat(
            [message.shown() for message in self.messages],
            self.limits(self.sampling(defaults, top), self.max_completion_tokens or self.max_tokens, owner),
            use=tool_use(self.tools, self.tool_choice, self.parallel_tool_calls),
            grammar=None if self.response_format is None else self.response_format.grammar(),
            settings=settings,
            is_continued=is_continued,
        )


class ChatWriter:
    """Writes the answers to one request.

    Args:
        request_id: the answer's id.
        model: name that the client knows the model by.
        request: what was asked.
        spell: writes a token's log-probabilities.
    """

    def __init__(self, request_id: str, model: str, request: ChatRequest, spell: Spell) -> None:
        self._head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": model}
        self._request, self._spell = request, spell
        self._has_usage = bool(request.stream_options and request.stream_options.include_usage)
        self._has_timings = bool(request.timings or request.timings_per_token)
        self._ended: list[Ended] = []

    def begin(self) -> list[dict[str, Any]]:
        """The first chunks: who speaks."""
        count = self._request.n or 1
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(count)]

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """The chunks of a stream that a delta of answer `index` makes."""
        if isinstance(delta, Said):
            return self._said(index, delta)
        if isinstance(delta, Called):
            return self._called(index, delta)
        self._ended.append(delta)
        last = self._chunk(index, {}, finish_reason=finish_reason(delta))
        return [{**last, **self._timings([delta])}]

    def progress(self, position: Position, seconds: float) -> list[dict[str, Any]]:
        """A chunk that says how far the prompt is read, as llama-server writes it.

        Args:
            position: how many tokens of the prompt are read.
            seconds: since it came.
        """
        read = {
            "total": position.prompt_tokens,
            "cache": position.cached_tokens,
            "processed": position.prefilled_tokens,
            "time_ms": round(1000 * seconds),
        }
        return [{**self._chunk(0, {}), "prompt_progress": read}]

    def end(self) -> list[dict[str, Any]]:
        """The last chunk, if the request wants to know the usage."""
        if not self._has_usage:
            return []
        return [{**self._head, **CHUNK, "choices": [], "usage": usage_of(self._ended)}]

    def whole(self, answers: list[list[Delta]]) -> dict[str, Any]:
        """The answers as one object."""
        choices = [self._choice(index, deltas) for index, deltas in enumerate(answers)]
        ended = [delta for deltas in answers for delta in deltas if isinstance(delta, Ended)]
        return {
            **self._head,
            "object": "chat.completion",
            "system_fingerprint": None,
            "choices": choices,
            "usage": usage_of(ended),
            **self._timings(ended),
        }

    def _timings(self, ended: list[Ended]) -> dict[str, Any]:
        return {"timings": timings_of(ended)} if self._has_timings else {}

    def _said(self, index: int, said: Said) -> list[dict[str, Any]]:
        field = "content" if said.channel == "content" else "reasoning_content"
        logprobs = self._logprobs(list(said.tokens))
        if not said.text and not logprobs:
            return []
        return [self._chunk(index, {field: said.text}, logprobs=logprobs)]

    def _called(self, index: int, call: Called) -> list[dict[str, Any]]:
        function = {"name": call.name, "arguments": ""}
        opening = {"index": call.index, "id": call.call_id, "type": "function", "function": function}
        rest = {"index": call.index, "function": {"arguments": call.arguments}}
        return [self._chunk(index, {"tool_calls": [part]}) for part in (opening, rest)]

    def _chunk(self, index: int, delta: dict[str, Any], **rest: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **rest}
        return {**self._head, **CHUNK, "choices": [choice], **({"usage": None} if self._has_usage else {})}

    def _choice(self, index: int, deltas: list[Delta]) -> dict[str, Any]:
        texts = {"content": "", "reasoning": ""}
        tokens: list[TokenEvent] = []
        calls = []
        reason = None
        for delta in deltas:
            if isinstance(delta, Said):
                texts[delta.channel] += delta.text
                tokens += delta.tokens
            elif isinstance(delta, Called):
                function = {"name": delta.name, "arguments": delta.arguments}
                calls.append({"id": delta.call_id, "type": "function", "function": function})
            else:
                reason = finish_reason(delta)
        message: dict[str, Any] = {"role": "assistant", "content": texts["content"] or (None if calls else "")}
        if texts["reasoning"]:
            message["reasoning_content"] = texts["reasoning"]
        if calls:
            message["tool_calls"] = calls
        logprobs = self._logprobs(tokens) or (NO_LOGPROBS if self._request.logprobs else None)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: list[TokenEvent]) -> dict[str, Any] | None:
        if not self._request.logprobs or not tokens:
            return None
        return {"content": [self._spell(token) for token in tokens], "refusal": None}


CHUNK = {"object": "chat.completion.chunk", "system_fingerprint": None}
NO_LOGPROBS: dict[str, Any] = {"content": [], "refusal": None}


def finish_reason(ended: Ended) -> str:
    """Why an answer ended, in OpenAI's words."""
    return ended.reason if ended.reason in ("stop", "length", "tool_calls") else "length"
