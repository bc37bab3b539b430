"""Reading threads: jobs with two priorities, a bounded number in flight, shut down with the interpreter.

Locks: `Ticket._lock` guards one ticket, `_Queues.lock` the queues; no code holds both. Only the thread that runs the
model waits for tickets. Every such wait has a limit, so that a lost disk is an error and not a hang.

That thread may get an exception between any two instructions (Ctrl-C, a timer). It therefore uses primitives of C only,
`Lock` and `SimpleQueue`. Condition and Event are written in Python: an exception after they took their lock leaves it
locked for ever, and one inside `notify` wakes a thread twice and another never.
"""

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from heapq import heapify, heappop, heappush
from itertools import count
from math import inf
from queue import Empty, SimpleQueue
from typing import NamedTuple

WAIT_S = 120.0
"""A read that has not ended by then never will: a disk that spins up takes 20 s, a stalled network mount 60 s."""
POLL_S = 0.001
"""Between two looks at whether reads have ended; a read of 4 MiB takes about 2 ms from a good disk."""


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
        self.is_finished = False
        # an event made of a lock: held until the ticket is finished, then released by the thread of the last job
        self._reading = threading.Lock()
        self._reading.acquire()

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
        # under the lock the last job either has yet to look where to land, or landed in the old queue and is put here
        with self._lock:
            self.landed = landed
            if self.is_finished:
                landed.put(self)

    def skip(self) -> None:
        """Called by a reading thread instead of running a job that is not wanted any more."""
        # counted first: the last `job_done` must not compare the checksum of an expert with a gap in it
        with self._lock:
            self._num_skipped += 1
        self.job_done()

    def wait(self, limit_s: float | None = None) -> None:
        """Wait until all jobs are done or skipped.

        Raises:
            TimeoutError: if that takes longer than `limit_s` seconds (WAIT_S if not given).
        """
        limit_s = WAIT_S if limit_s is None else limit_s
        if not self.is_finished and not self._reading.acquire(timeout=limit_s):
            raise TimeoutError(
                f"expert {self.expert} of MoE layer {self.layer} was not read within {limit_s:.0f} s; is its disk gone?"
            )

    def job_done(self, error: BaseException | None = None) -> None:
        """Called by a reading thread after each job."""
        with self._lock:
            self.error = self.error or error
            self._left -= 1
            if self._left:
                return
        # Only the thread of the last job comes here. It checks outside the lock: a checksum takes milliseconds, and the
        # model's thread may want to redirect the ticket meanwhile.
        if self._check is not None and self.error is None and not self._num_skipped:
            try:
                self._check()
            except Exception as caught:
                self.error = caught
        # set before the release, because whoever wakes from `wait` looks at it
        with self._lock:
            self.is_finished = True
            self._reading.release()
            self.landed.put(self)


def next_landed(landed: "SimpleQueue[Ticket]", waiting_for: str) -> Ticket:
    """The next ticket that is finished.

    Args:
        landed: where tickets land.
        waiting_for: what is on its way, for the message.

    Raises:
        TimeoutError: if none lands within WAIT_S seconds.
        OSError: if reading failed.
    """
    try:
        ticket = landed.get(timeout=WAIT_S)
    except Empty:
        raise TimeoutError(f"{waiting_for} was not read within {WAIT_S:.0f} s; is its disk gone?") from None
    if ticket.error is not None:
        raise OSError(
            f"reading expert {ticket.expert} of MoE layer {ticket.layer} failed: {ticket.error}"
        ) from ticket.error
    return ticket


Job = tuple[Ticket, Callable[[], None]]


class Waiting(NamedTuple):
    """A job that nothing needs yet; the smallest comes first."""

    less_urgent: float
    number: int
    """Of no two jobs the same, so that tickets are never compared."""
    ticket: Ticket
    job: Callable[[], None]


class ReadingThreads:
    """A few threads that run read jobs: what is needed now first, what may be needed later after that.

    Args:
        num_threads: reads in flight at most.
    """

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"at least 1 reading thread is needed; got {num_threads}")
        self._num_threads = num_threads
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._state = _Queues()
        self._threads = [
            threading.Thread(target=_work, args=(self._state,), name=f"expertier-read-{index}", daemon=True)
            for index in range(self._num_threads)
        ]
        for thread in self._threads:
            thread.start()
        # a function and not a method: a reference to self would keep it alive, and it would never be finalised
        self.close = weakref.finalize(self, _close, self._state, self._threads, self._process)

    def quiesce(self) -> None:
        """Give up what waits and let what runs end: from then on no thread writes to a slot, and no ticket lands.

        In a child of fork() there are no threads, and a lock that one of them held stays locked: new ones take over.

        Raises:
            TimeoutError: if a read does not end within WAIT_S seconds.
        """
        if self._process != os.getpid():
            self.close.detach()
            self._start()
            return
        state, end_s = self._state, time.monotonic() + WAIT_S
        # Nothing is submitted meanwhile: only the thread that runs the model submits, and it is here. It cancels and
        # does not drop: an exception could come between a drop and the end of its ticket, for which others may wait.
        # The reading threads, which get no exceptions, end the tickets.
        with state.lock:
            waiting = state.waiting_tickets()
            for ticket in waiting:
                ticket.is_cancelled = True
        # whoever submitted may have been interrupted before it called a thread
        for _ in waiting:
            state.calls.put(None)
        # asked for again and again instead of waited for, because waiting would take a lock in Python
        while state.is_busy:
            if time.monotonic() > end_s:
                raise TimeoutError(f"{state.running} reads did not end within {WAIT_S:.0f} s; is the disk gone?")
            time.sleep(POLL_S)

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one read was on its way, until now."""
        return self._state.busy_until_now()

    def submit(
        self, ticket: Ticket, jobs: list[Callable[[], None]], *, is_demand: bool = True, urgency: float = inf
    ) -> None:
        """Queue the jobs of one ticket.

        Args:
            urgency: among what is not needed now, the largest comes first, and of equal ones the earliest.
        """
        state = self._state
        with state.lock:
            for job in jobs:
                if is_demand:
                    state.demand.append((ticket, job))
                else:
                    heappush(state.ahead, Waiting(-urgency, next(state.numbers), ticket, job))
        # after the jobs: a thread that is called has to find one
        for _ in jobs:
            state.calls.put(None)

    def promote(self, ticket: Ticket) -> None:
        """Move what is left of a read-ahead to the front, because it is needed now."""
        with self._state.lock:
            mine = sorted(waiting for waiting in self._state.ahead if waiting.ticket is ticket)
            self._state.demand.extend((ticket, waiting.job) for waiting in mine)
            self._state.ahead = [waiting for waiting in self._state.ahead if waiting.ticket is not ticket]
            heapify(self._state.ahead)


class _Queues:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.demand: deque[Job] = deque()
        self.ahead: list[Waiting] = []
        """A heap: the most urgent is its first."""
        self.numbers = count()
        self.calls: SimpleQueue[None] = SimpleQueue()
        """One for each job; more only wake a thread for nothing."""
        self.is_closed = False
        self.busy_s = 0.0
        self.running, self._since_s = 0, 0.0

    @property
    def is_busy(self) -> bool:
        """Whether a job waits or runs."""
        with self.lock:
            return bool(self.demand or self.ahead or self.running)

    def busy_until_now(self) -> float:
        """Seconds with a job under way: layers that are streamed keep one so, without a pause, for many tokens."""
        with self.lock:
            return self.busy_s + (time.perf_counter() - self._since_s if self.running else 0.0)

    def waiting_tickets(self) -> list[Ticket]:
        """Of the jobs that wait, one for each; the caller holds the lock."""
        return [*(ticket for ticket, _ in self.demand), *(waiting.ticket for waiting in self.ahead)]

    def take(self) -> Job | None:
        """The next job, which counts as running from now on; None if there is none."""
        with self.lock:
            if self.is_closed or not (self.demand or self.ahead):
                return None
            if not self.running:
                self._since_s = time.perf_counter()
            self.running += 1
            if self.demand:
                return self.demand.popleft()
            first = heappop(self.ahead)
            return first.ticket, first.job

    def end(self) -> None:
        """A job has ended."""
        with self.lock:
            self.running -= 1
            if not self.running:
                self.busy_s += time.perf_counter() - self._since_s


def _work(state: _Queues) -> None:
    while not state.is_closed:
        state.calls.get()
        if (taken := state.take()) is None:
            continue
        ticket, job = taken
        if ticket.is_cancelled or ticket.error:
            ticket.skip()
        else:
            error: BaseException | None = None
            # everything is caught: a thread that died would leave its ticket without an end, and the model waiting
            try:
                job()
            except BaseException as caught:
                error = caught
            ticket.job_done(error)
        # last: when nothing runs, `quiesce` promises that no slot is written to and no ticket lands any more
        state.end()
        del ticket, job, taken  # a thread that waits must not keep a slot's memory


def _close(state: _Queues, threads: list[threading.Thread], process: int) -> None:
    if process != os.getpid():  # the threads, and whoever holds the lock, are the parent's
        return
    with state.lock:
        state.is_closed = True
        waiting = state.waiting_tickets()
        state.demand.clear()
        state.ahead.clear()
    for _ in threads:
        state.calls.put(None)
    for ticket in waiting:
        ticket.job_done(RuntimeError("the reading threads were shut down"))
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join()
