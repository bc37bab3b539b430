"""Reading threads: jobs with two priorities, a bounded number in flight, shut down with the interpreter."""

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue


class Ticket:
    """The reading of one expert: finished when all its jobs are; `error` says what went wrong, if anything did."""

    def __init__(
        self,
        layer: int,
        expert: int,
        slot: int,
        num_jobs: int,
        landed: "SimpleQueue[Ticket]",
        check: Callable[[], None] | None = None,
    ) -> None:
        self.layer, self.expert, self.slot = layer, expert, slot
        self._check = check
        self.error: BaseException | None = None
        self.is_cancelled = False
        self.landed = landed
        self._num_jobs = self._left = num_jobs
        self._num_skipped = 0
        self._lock = threading.Lock()
        self._finished = threading.Event()

    @property
    def is_finished(self) -> bool:
        return self._finished.is_set()

    @property
    def share_read(self) -> float:
        """How much of it was read, once it is finished."""
        return 1 - self._num_skipped / self._num_jobs

    @property
    def is_complete(self) -> bool:
        """Whether all bytes were read; a cancelled ticket may still be, if no job was skipped."""
        return self.is_finished and not self._num_skipped and self.error is None

    def redirect(self, landed: "SimpleQueue[Ticket]") -> None:
        """Land in another queue, at once if it is finished already."""
        with self._lock:
            self.landed = landed
            if self._finished.is_set():
                landed.put(self)

    def skip(self) -> None:
        """Called by a reading thread instead of running a job that is not wanted any more."""
        with self._lock:
            self._num_skipped += 1
        self.job_done()

    def wait(self) -> None:
        self._finished.wait()

    def job_done(self, error: BaseException | None = None) -> None:
        """Called by a reading thread after each job."""
        with self._lock:
            self.error = self.error or error
            self._left -= 1
            if self._left:
                return
        if self._check is not None and self.error is None and not self._num_skipped:
            try:
                self._check()
            except Exception as caught:
                self.error = caught
        with self._lock:
            self._finished.set()
            self.landed.put(self)


Job = tuple[Ticket, Callable[[], None]]


class ReadingThreads:
    """A few threads that run read jobs: what is needed now first, what may be needed later after that.

    Args:
        num_threads: reads in flight at most.
    """

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"at least 1 reading thread is needed; got {num_threads}")
        self._state = _Queues()
        self._threads = [
            threading.Thread(target=_work, args=(self._state,), name=f"expertier-read-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()
        self.close = weakref.finalize(self, _close, self._state, self._threads)

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one read was on its way."""
        return self._state.busy_s

    def submit(self, ticket: Ticket, jobs: list[Callable[[], None]], *, is_demand: bool = True) -> None:
        """Queue the jobs of one ticket."""
        with self._state.ready:
            queue = self._state.demand if is_demand else self._state.ahead
            queue.extend((ticket, job) for job in jobs)
            self._state.ready.notify(len(jobs))

    def promote(self, ticket: Ticket) -> None:
        """Move what is left of a read-ahead to the front, because it is needed now."""
        with self._state.ready:
            kept: deque[Job] = deque()
            for job in self._state.ahead:
                (self._state.demand if job[0] is ticket else kept).append(job)
            self._state.ahead = kept


class _Queues:
    def __init__(self) -> None:
        self.ready = threading.Condition()
        self.demand: deque[Job] = deque()
        self.ahead: deque[Job] = deque()
        self.is_closed = False
        self.busy_s = 0.0
        self._running, self._since_s = 0, 0.0

    def begin(self) -> None:
        """A read begins; `ready` is held."""
        if not self._running:
            self._since_s = time.perf_counter()
        self._running += 1

    def end(self) -> None:
        with self.ready:
            self._running -= 1
            if not self._running:
                self.busy_s += time.perf_counter() - self._since_s


def _work(state: _Queues) -> None:
    while True:
        with state.ready:
            while not (state.demand or state.ahead or state.is_closed):
                state.ready.wait()
            if state.is_closed:
                return
            ticket, job = (state.demand or state.ahead).popleft()
            state.begin()
        if ticket.is_cancelled or ticket.error:
            ticket.skip()
        else:
            error: BaseException | None = None
            try:
                job()
            except BaseException as caught:
                error = caught
            ticket.job_done(error)
        state.end()
        del ticket, job


def _close(state: _Queues, threads: list[threading.Thread]) -> None:
    with state.ready:
        state.is_closed = True
        waiting = [*state.demand, *state.ahead]
        state.demand.clear()
        state.ahead.clear()
        state.ready.notify_all()
    for ticket, _ in waiting:
        ticket.job_done(RuntimeError("the reading threads were shut down"))
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()
