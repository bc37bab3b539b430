"""The engine: one thread owns the model, others submit requests and read their streams."""

import gc
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Self

from .assembly import ModelInfo, build_loop
from .counters import EngineCounters, Tally
from .events import NotReady, QueueFull
from .loop import Loop, one_line
from .options import EngineOptions
from .planning.pool import Departures, FairQueue
from .request import GenerationRequest
from .sequence import RunningSequence
from .stream import Stream

EngineState = Literal["loading", "ready", "closing", "closed", "failed"]
CLOSING = "the server is shutting down"


class Engine:
    """Answers requests of many callers with one model.

    A thread loads the model, owns it from then on, and computes all steps. Submitting never waits for a step.

    Args:
        open_model: gives a model of `offload.load`; called in the engine's thread.
        options: limits and choices.
    """

    def __init__(self, open_model: Callable[[], Any], options: EngineOptions | None = None) -> None:
        self._options = options or EngineOptions()
        self._changed = threading.Condition()
        self._waiting: FairQueue[RunningSequence] = FairQueue()
        self._state: EngineState = "loading"
        self._failure: Exception | None = None
        self._loop: Loop | None = None
        self._last_moment: dict[str, Any] = {}
        self._info: ModelInfo | None = None
        self._tally = Tally()
        self._refused = self._left_queue = self._starting = 0
        self._departures = Departures(time.monotonic())
        self._thread = threading.Thread(target=self._serve, args=(open_model,), name="expertier-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(grace_s=0 if kind else 30.0)

    @property
    def state(self) -> EngineState:
        """`loading`, then `ready`, then `closing` and `closed`; `failed` after an error that ended the thread."""
        return self._state

    @property
    def failure(self) -> str:
        """Why the engine failed; empty if it did not."""
        return "" if self._failure is None else f"{type(self._failure).__name__}: {self._failure}"

    @property
    def model_info(self) -> ModelInfo:
        """What callers need to know of the model.

        Raises:
            NotReady: while it is not loaded.
        """
        if self._info is None:
            raise NotReady(self._why_not_ready())
        return self._info

    def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until the model is loaded.

        Args:
            timeout_s: seconds to wait; None waits for ever.

        Raises:
            TimeoutError: if it is not in time.
            Exception: what loading raised.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._state != "loading", timeout_s):
                raise TimeoutError(f"the model is not loaded after {timeout_s} s")
            if self._failure is not None:
                raise self._failure

    def submit(self, request: GenerationRequest) -> Stream:
        """Accept a request; its answer comes through the stream.

        Raises:
            ValueError: if it can never be answered: too long, or with ids that the model does not know.
            QueueFull: if as many wait as may.
            NotReady: while the model is loading, or when the engine is closing or has failed.
        """
        with self._changed:
            if self._state != "ready" or self._loop is None or self._info is None:
                raise NotReady(self._why_not_ready())
            _expect_possible(request, self._info, self._options)
            running = len(self._loop.admission.running) + self._starting
            if len(self._waiting) + running >= self._options.most_users + self._options.most_queued:
                self._refused += 1
                retry_s = self._departures.expected_s(time.monotonic())
                raise QueueFull(
                    f"{running} requests run and {len(self._waiting)} wait, as many as may; "
                    f"try again in {retry_s:.0f} s",
                    retry_s,
                )
            self._departures.note_start(time.monotonic(), is_first=running == 0)
            sequence = RunningSequence(request, self._info.end_ids, cancel=self._cancel, ahead=self._ahead)
            self._waiting.add(sequence)
            self._changed.notify_all()
            return sequence.stream

    def counters(self) -> EngineCounters:
        """What the engine has done and does now."""
        with self._changed:
            loop, grown = self._loop, self._tally.grown()
            if self._left_queue:
                finished = grown["finished_total"]
                finished["cancelled"] = finished.get("cancelled", 0) + self._left_queue
            return EngineCounters(
                state=self._state,
                queued=len(self._waiting) + self._starting,
                refused_total=self._refused,
                **grown,
                **(self._last_moment if loop is None else loop.moment()),
            )

    def close(self, grace_s: float = 30.0) -> None:
        """Refuse new requests, let running ones finish for a while, cancel the rest, and close the model.

        Args:
            grace_s: seconds that running requests get, 0 or more. Requests that wait are cancelled at once.
        """
        with self._changed:
            if self._state in ("loading", "ready"):
                self._state = "closing"
            queued = list(self._waiting)
            for sequence in queued:
                self._waiting.remove(sequence)
            self._left_queue += len(queued)
            self._changed.notify_all()
        for sequence in queued:
            sequence.finish("cancelled", CLOSING)
        self._thread.join(grace_s)
        with self._changed:
            for sequence in list(self._loop.admission.running) if self._loop is not None else []:
                sequence.is_cancelled = True
        self._thread.join()

    def _why_not_ready(self) -> str:
        reasons = {"loading": "the model is loading", "closing": CLOSING, "closed": "the server is closed"}
        return reasons.get(self._state, f"the engine has failed ({self.failure})")

    def _cancel(self, sequence: RunningSequence) -> None:
        """From any thread: end one that waits now, one that runs within its step."""
        with self._changed:
            was_waiting = self._waiting.remove(sequence)
            self._left_queue += was_waiting
            sequence.is_cancelled = True
        if was_waiting:
            sequence.finish("cancelled")

    def _ahead(self, sequence: RunningSequence) -> int:
        with self._changed:
            waiting = list(self._waiting)
            return waiting.index(sequence) if sequence in waiting else 0

    def _serve(self, open_model: Callable[[], Any]) -> None:
        """The engine's thread, from loading to closing."""
        model: Any = None
        try:
            model = open_model()
            self._loop, self._info = build_loop(model, self._options, self._tally)
            with self._changed:
                self._state = "ready" if self._state == "loading" else self._state
                self._changed.notify_all()
            while self._let_in(self._loop):
                self._step(self._loop)
        except Exception as error:  # whatever it is, callers who wait must hear of it
            self._failure = error
        finally:
            self._end(model)
            del model
            gc.collect()  # modules and their hooks refer to each other; who closed an engine wants its memory back

    def _let_in(self, loop: Loop) -> bool:
        """Start what can start, and wait until there is something to do; False when all is done and no more comes."""
        while True:
            with self._changed:
                sequence = loop.admission.next_of(self._waiting)
                if sequence is None and (loop.admission.running or self._state != "ready"):
                    return bool(loop.admission.running)
                if sequence is None:
                    self._changed.wait()
                    continue
                self._waiting.serve(sequence)
                self._starting = 1
            self._start(loop, sequence)
            with self._changed:
                self._starting = 0

    def _start(self, loop: Loop, sequence: RunningSequence) -> None:
        """Let one in; without the lock, because its prefix may have to be read from disk."""
        try:
            loop.admission.start(sequence)
        except Exception as error:  # no memory, a bug: this request ends, the engine goes on
            loop.admission.refuse(sequence, one_line(error))

    def _step(self, loop: Loop) -> None:
        before = self._tally.finished_total.total()
        loop.step()
        for _ in range(self._tally.finished_total.total() - before):
            self._departures.note_end(time.monotonic())

    def _end(self, model: Any) -> None:
        with self._changed:
            self._state = "closed" if self._failure is None else "failed"
            left = [*(self._loop.admission.running if self._loop is not None else ()), *self._waiting]
            self._changed.notify_all()
        for sequence in left:
            sequence.finish("error", self._why_not_ready())
        if self._loop is not None:
            self._loop.close()
            with self._changed:
                self._last_moment, self._loop = self._loop.moment(), None
        if model is not None:
            model.offload.close()


def _expect_possible(request: GenerationRequest, info: ModelInfo, options: EngineOptions) -> None:
    """Refuse what can never be answered."""
    wanted = len(request.prompt_ids) + request.max_new_tokens
    if request.num_reserved > info.context_tokens:
        raise ValueError(
            f"{len(request.prompt_ids)} tokens of prompt and {request.max_new_tokens} new ones are {wanted}; "
            f"a request may have {info.context_tokens + 1} in all"
        )
    if request.max_new_tokens > options.most_new_tokens:
        raise ValueError(f"{request.max_new_tokens} new tokens were asked for; at most {options.most_new_tokens} are")
    ids = [*request.prompt_ids, *request.sampling.logit_bias, *request.stop_ids]
    if max(ids) >= info.vocab_size or min(ids) < 0:
        wrong = next(token_id for token_id in ids if not 0 <= token_id < info.vocab_size)
        raise ValueError(f"token {wrong} does not exist; the model knows 0 to {info.vocab_size - 1}")
