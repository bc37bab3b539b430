"""Who may change what a running model keeps, and whether an exception has left it half changed.

An exception can come between any two lines of Python (Ctrl-C, a timer, no memory). Changes are therefore unfinished
from the first line of a call to the last. A call that finds them so clears every slot and starts from nothing.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Changes:
    """One thread at a time, in the process that last entered.

    Args:
        clear: forgets everything. Whoever interrupts it leaves changes unfinished, so it is done again.
    """

    def __init__(self, clear: Callable[[], None]) -> None:
        # re-entrant: a signal handler that calls the model within a call must not wait for itself for ever
        self.lock, self._process = threading.RLock(), os.getpid()
        self._clear, self._are_finished = clear, True
        self.may_fork = True

    def enter_process(self) -> None:
        """In a child of fork(): the lock may be held by a thread that is not here, and no thread reads.

        Raises:
            RuntimeError: in a child, if a GPU is used.
        """
        if self._process == os.getpid():
            return
        if not self.may_fork:
            raise RuntimeError("CUDA does not work in a forked process; start processes by spawn and load there")
        self.lock, self._process, self._are_finished = threading.RLock(), os.getpid(), False

    def begin(self) -> None:
        """Start to change, under the lock; what an earlier call left half changed goes first."""
        if not self._are_finished:
            self._clear()
        self._are_finished = False

    def finish(self) -> None:
        """All changes are done."""
        self._are_finished = True

    @contextmanager
    def within(self) -> Iterator[None]:
        """Within, the bookkeeping changes, under the lock; an exception leaves it half changed."""
        self.enter_process()
        with self.lock:
            self.begin()
            yield
            self.finish()
