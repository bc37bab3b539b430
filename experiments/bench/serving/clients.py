"""Users of an engine: requests that follow recorded rows, and threads that note when each token came.

Shapes: V vocabulary.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload import Engine, Finished, GenerationRequest, Sampling, Stream

ROWS_APART = 2000
"""Rows between the beginnings of two users, so that long prompts of one do not reach into the rows of the next."""


def user_rows(user: int, count: int) -> list[int]:
    """Rows of a replay checkpoint that this user's conversation follows: a stretch of its own."""
    return list(range(user * ROWS_APART, user * ROWS_APART + count))


class Follow:
    """A constraint that lets exactly these tokens come: rows of a replay checkpoint, whose routing is recorded.

    Args:
        token_ids: the answer, without the prompt.
        vocab_size: V; ids are drawn below it.
    """

    def __init__(self, token_ids: Sequence[int], vocab_size: int) -> None:
        self._left, self._allowed_V = list(token_ids), np.zeros(vocab_size, bool)

    def allowed_V(self) -> NDArray[np.bool_]:
        self._allowed_V[:] = False
        self._allowed_V[self._left[0]] = True
        return self._allowed_V

    def accept(self, token_id: int) -> None:
        self._left.pop(0)


@dataclass
class Answer:
    """What a user saw."""

    started_s: float = 0.0
    time_s: list[float] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        return self.time_s[0] - self.started_s

    @property
    def longest_gap_s(self) -> float:
        """The longest time between two tokens."""
        return max((after - before for before, after in pairwise(self.time_s)), default=0.0)


def follow(rows: Sequence[int], new_tokens: int, vocab_size: int, owner: str = "") -> GenerationRequest:
    """A request whose prompt and answer are rows of a replay checkpoint; the last `new_tokens` are the answer."""
    ids = [row % vocab_size for row in rows]
    prompt, answer = ids[:-new_tokens], ids[-new_tokens:]
    return GenerationRequest(
        prompt_ids=tuple(prompt),
        max_new_tokens=new_tokens,
        sampling=Sampling(top_logprobs=5),
        ignore_end=True,
        constraint=Follow(answer, vocab_size),
        owner=owner,
    )


def watch(stream: Stream) -> tuple[Answer, threading.Event]:
    """Note each token of a stream as it comes; the event is set at the end."""
    answer, done = Answer(started_s=time.perf_counter()), threading.Event()

    def read(event: Any) -> None:
        if isinstance(event, Finished):
            answer.finished = event
            done.set()
        else:
            answer.time_s.append(time.perf_counter())
            answer.events.append(event)

    stream.subscribe(read)
    return answer, done


def ask_all(engine: Engine, requests: Sequence[GenerationRequest]) -> list[Answer]:
    """Submit all at once, and wait for all.

    Raises:
        RuntimeError: if one fails.
    """
    watched = [watch(engine.submit(request)) for request in requests]
    for answer, done in watched:
        done.wait()
        if answer.finished is None or answer.finished.reason != "length":
            raise RuntimeError(f"a request ended early: {answer.finished}")
    return [answer for answer, _ in watched]
