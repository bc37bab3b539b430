"""From an ask to its deltas in an event loop: worker threads for templates and grammars, the engine for tokens."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from ...engine.events import Event, NotReady, Position, QueueFull
from ...engine.request import GenerationRequest
from ..answers import AnswerText, Delta, Ended, request_of
from ..asks import Ask, Asker
from ..grammars import Grammars
from ..wire.errors import ApiError, wrong_field
from .metrics import Metrics, Stopwatch

WORKERS = 2
"""Threads for templates, tokenising and grammars. They compete with the model for the processor."""
LONGEST_WORK_S = 30.0
"""Seconds that a template or a grammar may take. The longest prompts that were tried took below one."""
LOADING_RETRY_S = 5.0
"""What a client is told to wait while the model loads: small models take seconds, large ones minutes. Not tuned."""
T = TypeVar("T")


class Answering(Protocol):
    """What the engine offers; see `offload.engine`."""

    def submit(self, request: GenerationRequest) -> Any: ...


class Desk:
    """Takes asks in and hands answers out; requests come in only while it is open.

    Args:
        engine: generates.
        asker: makes asks of requests.
        grammars: compiles their grammars.
        metrics: counts tokens and endings.
        time_limit_s: seconds that a request may take, in the queue and after; None: no limit but its own.
    """

    def __init__(
        self,
        engine: Answering,
        asker: Asker,
        grammars: Grammars,
        metrics: Metrics,
        time_limit_s: float | None = None,
    ) -> None:
        self._engine, self.asker, self.grammars, self._metrics = engine, asker, grammars, metrics
        self._time_limit_s = time_limit_s
        self._workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="prompt")

    async def prepare(self, work: Callable[[], T]) -> T:
        """The result of work that would stall the event loop.

        Raises:
            ApiError: 400 if it refuses its input, 503 if it takes too long.
        """
        loop = asyncio.get_running_loop()
        try:
            return await asyncio.wait_for(loop.run_in_executor(self._workers, work), LONGEST_WORK_S)
        except ValueError as error:
            raise wrong_field(error) from error
        except TimeoutError:
            raise ApiError(503, f"the prompt could not be made ready within {LONGEST_WORK_S:.0f} s") from None

    async def open(self, asks: Sequence[Ask]) -> "Running":
        """Hand asks to the engine, all or none.

        Raises:
            ApiError: 400 for a grammar that cannot be used, 429 if the queue is full, 503 if the engine is not ready.
        """
        constraints = [await self.prepare(lambda ask=ask: self._constraint(ask)) for ask in asks]  # type: ignore[misc]
        requests = [
            request_of(ask, self.asker.vocabulary, constraint)
            for ask, constraint in zip(asks, constraints, strict=True)
        ]
        running = Running([AnswerText(ask, self.asker.vocabulary) for ask in asks], self._metrics)
        try:
            for index, request in enumerate(requests):
                running.follow(index, self._engine.submit(request))
        except BaseException as error:
            running.cancel()
            raise _refusal(error) from error
        limits = [limit for limit in (self._time_limit_s, asks[0].limits.time_limit_s) if limit is not None]
        if limits:
            running.limit(min(limits))
        return running

    def close(self) -> None:
        """Let the workers end."""
        self._workers.shutdown(wait=False, cancel_futures=True)

    def _constraint(self, ask: Ask) -> Any:
        if ask.grammar is None:
            return None
        return self.grammars.compile(ask.grammar, ask.format.answer_begins(ask.prompt_end))


def _refusal(error: BaseException) -> BaseException:
    """What a client is told of a request that the engine did not take."""
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="rate_limit_exceeded", retry_after_s=error.retry_after_s)
    if isinstance(error, NotReady):
        return ApiError(503, str(error), code="not_ready", retry_after_s=LOADING_RETRY_S)
    return wrong_field(error) if isinstance(error, ValueError) else error


class Running:
    """Answers that are being generated for one request.

    Args:
        texts: readers of the answers.
        metrics: counts tokens and endings.
    """

    def __init__(self, texts: Sequence[AnswerText], metrics: Metrics) -> None:
        self._texts, self._metrics = list(texts), metrics
        self._watches = [Stopwatch(metrics) for _ in texts]
        self._streams: list[Any] = []
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._came_s = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._limit_s: float | None = None
        """The time limit, once it is over."""

    def follow(self, index: int, stream: Any) -> None:
        """Take the events of answer `index` from a stream."""
        self._streams.append(stream)
        stream.subscribe(lambda event: self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event)))

    def limit(self, seconds: float) -> None:
        """End all answers after so many seconds, with what there is of them."""
        self._timer = self._loop.call_later(seconds, self._time_out, seconds)

    def _time_out(self, seconds: float) -> None:
        self._limit_s = seconds
        self.cancel()

    def cancel(self) -> None:
        """Stop all that still run."""
        if self._timer is not None:
            self._timer.cancel()
        for stream in self._streams:
            stream.cancel()

    @property
    def age_s(self) -> float:
        """Seconds since the engine was asked."""
        return time.monotonic() - self._came_s

    def position(self) -> Position:
        """How far the first answer is."""
        position: Position = self._streams[0].position()
        return position

    async def deltas(self, idle_s: float | None = None) -> AsyncIterator[tuple[int, Delta | None]]:
        """Index and delta of the answers as they come, until each has ended; leaving cancels them.

        Args:
            idle_s: after so many seconds without any, None comes as a sign of life.
        """
        left = len(self._texts)
        try:
            while left:
                try:
                    index, event = await asyncio.wait_for(self._events.get(), idle_s)
                except TimeoutError:
                    yield 0, None
                    continue
                self._watches[index].tick()
                for delta in self._texts[index].put(event):
                    if isinstance(delta, Ended):
                        left -= 1
                        delta = self._as_timeout(delta)
                        self._metrics.ended(delta)
                    yield index, delta
        finally:
            self.cancel()

    def _as_timeout(self, ended: Ended) -> Ended:
        """The end as it is told: one that the time limit has cancelled is no other cancellation."""
        if self._limit_s is None or ended.reason != "cancelled":
            return ended
        return replace(ended, reason="timeout", message=f"the answer was not there within {self._limit_s:g} s")

    async def whole(self) -> list[list[Delta]]:
        """All deltas of each answer.

        Raises:
            ApiError: 500 if one failed, 503 if it was cancelled by the server.
        """
        answers: list[list[Delta]] = [[] for _ in self._texts]
        async with aclosing(self.deltas()) as deltas:
            async for index, delta in deltas:
                if delta is not None:
                    expect_success(delta)
                    answers[index].append(delta)
        return answers


def expect_success(delta: Delta) -> None:
    """Refuse an ending that is none of an answer.

    Raises:
        ApiError: 500 if it failed, 400 if the request's own grammar did, 504 if there was no token within its time
            limit, 503 if the server cancelled it.
    """
    if not isinstance(delta, Ended):
        return
    if delta.reason == "error":
        raise ApiError(500, delta.message or "the answer failed", code="server_error")
    if delta.reason == "invalid":
        raise ApiError(400, delta.message, code="invalid_value")
    if delta.reason == "timeout" and not delta.usage.completion_tokens:
        raise ApiError(504, delta.message, code="timeout", is_final=True)
    if delta.reason == "cancelled":
        raise ApiError(503, delta.message or "the server is shutting down", code="cancelled", retry_after_s=5)
