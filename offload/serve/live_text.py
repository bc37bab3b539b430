"""The text of `generate` while it grows: shown, timed, ended by stop strings, its trace saved now and then."""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from transformers.generation.streamers import BaseStreamer

from ..text.pieces import TextPieces
from ..text.stops import StopStrings


class Text(Protocol):
    """What turns tokens into text."""

    def decode(self, token_ids: Sequence[int]) -> str: ...


TRACE_EVERY_S = 5.0
"""Most seconds of routing that a power cut costs. A save rewrites the whole trace, and generation waits meanwhile:
0.2 s for 1,000 tokens of 16 layers with K = 8 on two slow cores."""
STATUS_EVERY_S = 0.5
"""Twice a second can be read; each line asks for a whole report. Other values were not tried."""


class LiveText(BaseStreamer):  # type: ignore[misc]
    """Receives tokens from `generate`: shows them, notes when they came, saves the trace, reports speed now and then.

    Args:
        text: turns tokens into text.
        show: receives pieces of text; a character whose bytes are incomplete waits.
        save_trace: called every TRACE_EVERY_S seconds.
        say_status: receives tokens per second, every STATUS_EVERY_S seconds.
        after_prefill: called when the first token is there.
        stops: the text ends before the first of these strings.
    """

    def __init__(
        self,
        text: Text,
        show: Callable[[str], None],
        save_trace: Callable[[], None] | None,
        say_status: Callable[[float], None] | None = None,
        after_prefill: Callable[[], None] = lambda: None,
        stops: Sequence[str] = (),
    ) -> None:
        self._after_prefill = after_prefill
        self.token_ids: list[int] = []
        self.time_s: list[float] = []
        self._show, self._save_trace, self._say_status = show, save_trace, say_status
        self._pieces, self._stops = TextPieces(text.decode), StopStrings(stops)
        self.whole = ""
        self._saved_s = self._said_s = time.perf_counter()
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:
            self._is_prompt = False
            return
        if not self.token_ids:
            self._after_prefill()
        fresh = value.reshape(-1).tolist()
        self.token_ids.extend(fresh)
        self.time_s.append(time.perf_counter())
        for token_id in fresh:
            self._add(self._stops.put(self._pieces.put(token_id)))
        if self._save_trace and self.time_s[-1] - self._saved_s > TRACE_EVERY_S:
            self._save_trace()
            self._saved_s = time.perf_counter()

        if self._say_status and self.time_s[-1] - self._said_s > STATUS_EVERY_S and len(self.time_s) > 1:
            self._say_status((len(self.time_s) - 1) / (self.time_s[-1] - self.time_s[0]))
            self._said_s = self.time_s[-1]

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.found is not None

    def end(self) -> None:
        self._add(self._stops.put(self._pieces.end()) + self._stops.end())

    def _add(self, piece: str) -> None:
        self.whole += piece
        self._show(piece)


class Stretches(BaseStreamer):  # type: ignore[misc]
    """One text that `generate` gives in several calls: the prompt of a further call was given already.

    Args:
        live: receives the first prompt, and all tokens; ended by the caller.
    """

    def __init__(self, live: LiveText) -> None:
        self._live, self._is_prompt, self._is_first = live, True, True

    def put(self, value: torch.Tensor) -> None:
        if not self._is_prompt or self._is_first:
            self._live.put(value)
        self._is_prompt = self._is_first = False

    def end(self) -> None:
        self._is_prompt = True
