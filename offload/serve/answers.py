"""An answer as it comes: from the engine's tokens to text by channel, calls of tools, and how it ended."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from ..engine.events import Event, Finished, TokenEvent, Usage
from ..engine.request import GenerationRequest
from ..text.channels import Part
from ..text.stops import StopStrings
from ..text.tool_calls import read_calls
from ..text.vocabulary import Vocabulary
from .asks import Ask

Ending = Literal["stop", "length", "tool_calls", "timeout", "cancelled", "invalid", "error"]


@dataclass(frozen=True, kw_only=True)
class Said:
    """A piece of text.

    Args:
        channel: what the user reads, or the reasoning before it.
        text: the piece; empty if there are only tokens.
        tokens: the tokens since the last piece, control tokens excluded.
    """

    channel: Literal["content", "reasoning"]
    text: str
    tokens: tuple[TokenEvent, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Called:
    """A call of a tool.

    Args:
        index: its place among the answer's calls, from 0.
        call_id: a fresh name for it.
        name: of the tool that the model calls.
        arguments: a JSON object as text.
    """

    index: int
    call_id: str
    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How an answer ended.

    Args:
        reason: as the engine says; `tool_calls` if it stopped after calls, `timeout` if its time limit cancelled it.
        usage: what it took.
        stop_string: the stop string that ended it, or None.
        reasoning_tokens: tokens of its reasoning.
        message: one line about an error.
    """

    reason: Ending
    usage: Usage
    stop_string: str | None = None
    reasoning_tokens: int = 0
    message: str = ""


Delta = Said | Called | Ended


@dataclass
class AnswerText:
    """Turns the events of one answer into what a reader sees.

    Args:
        ask: what was asked.
        vocabulary: tokens of the model.
    """

    ask: Ask
    vocabulary: Vocabulary
    _waiting: list[TokenEvent] = field(default_factory=list)
    _num_calls: int = 0
    _reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        self._pieces = self.vocabulary.pieces()
        self._stops = StopStrings(self.ask.limits.stops)
        self._channels = self.ask.channels()
        self._is_reasoning = self.ask.format.opened_by(self.ask.prompt_end) is not None

    def put(self, event: Event) -> list[Delta]:
        """What an event adds; after `Finished` the last is an `Ended`."""
        if isinstance(event, Finished):
            return self._end(event)
        if self._stops.found is not None:
            return []
        if self.vocabulary.is_text(event.token_id):
            self._waiting.append(event)
        deltas = self._read(self._channels.put(self._stops.put(self._pieces.put(event.token_id))))
        self._reasoning_tokens += self._is_reasoning
        return deltas

    def _end(self, finished: Finished) -> list[Delta]:
        rest = "" if self._stops.found is not None else self._stops.put(self._pieces.end())
        parts = self._channels.put(rest + self._stops.end()) + self._channels.end()
        deltas = self._read(parts)
        if self._waiting:
            deltas.append(self._said("content", ""))
        is_call = finished.reason == "stop" and self._num_calls > 0
        ended = Ended(
            reason="tool_calls" if is_call else finished.reason,
            usage=finished.usage,
            stop_string=self._stops.found,
            reasoning_tokens=self._reasoning_tokens,
            message=finished.message,
        )
        return [*deltas, ended]

    def _read(self, parts: list[Part]) -> list[Delta]:
        deltas: list[Delta] = []
        for part in parts:
            self._is_reasoning = part.channel == "reasoning"
            if part.channel != "call":
                deltas.append(self._said(part.channel, part.text))
            elif calls := self._called(part):
                deltas += calls
            else:  # no call after all; the reader sees what the model wrote
                deltas.append(self._said("content", part.text))
        return deltas

    def _said(self, channel: Literal["content", "reasoning"], text: str) -> Said:
        tokens, self._waiting = tuple(self._waiting), []
        return Said(channel=channel, text=text, tokens=tokens)

    def _called(self, part: Part) -> list[Called]:
        calls = [call for call in read_calls(part, self.ask.tools) if call.name in self.ask.tools]
        first = self._num_calls
        self._num_calls += len(calls)
        if calls:
            self._waiting = []
        return [
            Called(
                index=first + index, call_id=f"call_{secrets.token_hex(12)}", name=call.name, arguments=call.arguments
            )
            for index, call in enumerate(calls)
        ]


def request_of(ask: Ask, vocabulary: Vocabulary, constraint: Any = None) -> GenerationRequest:
    """The engine's request of an ask.

    Args:
        ask: what is wanted.
        vocabulary: turns tokens into the text that stop strings are looked for in.
        constraint: the ask's grammar, compiled; a TokenConstraint.
    """
    limits = ask.limits
    return GenerationRequest(
        prompt_ids=ask.prompt_ids,
        max_new_tokens=ask.max_new_tokens,
        sampling=limits.sampling,
        ignore_end=limits.ignore_end,
        is_stop=_stop_watch(ask, vocabulary) if limits.stops else None,
        constraint=constraint,
        owner=limits.owner,
    )


def _stop_watch(ask: Ask, vocabulary: Vocabulary) -> Callable[[int], bool]:
    """Whether a stop string is complete after a token; asked in the engine's thread, with pieces of its own."""
    pieces, watch = vocabulary.pieces(), StopStrings(ask.limits.stops)

    def is_stop(token_id: int) -> bool:
        watch.put(pieces.put(token_id))
        return watch.found is not None

    return is_stop


def read_answer(engine: Any, ask: Ask, vocabulary: Vocabulary, constraint: Any = None) -> Iterator[Delta]:
    """The answer to an ask, for a thread that waits for it; leaving the loop cancels it.

    Raises:
        QueueFull, NotReady: if the engine refuses the request.
    """
    stream = engine.submit(request_of(ask, vocabulary, constraint))
    text = AnswerText(ask, vocabulary)
    try:
        for event in stream:
            yield from text.put(event)
    finally:
        stream.cancel()
