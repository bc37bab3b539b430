"""Several passes of one model that meet at every experts module, so that an expert is read once for all of them.

Each pass runs in a thread of its own, but only one thread runs at a time, in the order of the passes. A pass that
reaches an experts module asks and waits. When all passes have asked, the caller of `run` answers all of them at once.
The same holds in backward passes: on a CPU, autograd runs a backward pass in the thread that started it.

No family's code is changed or known: whatever lies between two experts modules runs as it is written.
"""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import local
from typing import Any


class PassStoppedError(Exception):
    """Raised inside a pass that waits for an answer which will not come."""


@dataclass(frozen=True)
class Ask:
    """What one pass wants at a meeting: `place` is the same in all passes."""

    place: Hashable
    what: Any


@dataclass(eq=False)
class _Pass:
    """One pass, as its thread and the caller of `run` see it: the queues hand over who runs."""

    number: int
    told: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    asked: SimpleQueue[Any] = field(default_factory=SimpleQueue)
    result: Any = None


class Lockstep:
    """Runs passes side by side.

    Args:
        most: passes at a time, at least 1. Threads are kept, because each has a pool of its own for products.
        enter: called with a pass's number whenever that pass is about to go on.
    """

    def __init__(self, most: int, enter: Callable[[int], None] = lambda number: None) -> None:
        self.enter = enter
        self._threads = ThreadPoolExecutor(most, thread_name_prefix="expertier-pass")
        self._here = local()
        self._most = most

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def ask(self, place: Hashable, what: Any) -> Any:
        """Called within a pass: wait until all passes are here; the answer to this one.

        Raises:
            RuntimeError: outside a pass.
        """
        current = getattr(self._here, "current", None)
        if current is None:
            raise RuntimeError("experts of a model that is fine-tuned are computed within a step only")
        current.asked.put(Ask(place, what))
        kind, answer = current.told.get()
        if kind == "stop":
            raise PassStoppedError
        return answer

    def run(
        self,
        passes: Sequence[Callable[[], Any]],
        answer: Callable[[Hashable, list[Any]], Sequence[Any]],
    ) -> list[Any]:
        """Run passes from their beginning to their end.

        Args:
            passes: what each pass does, `most` at most.
            answer: called with the place and what each pass wants there; an answer for each.

        Returns:
            What each pass returned.

        Raises:
            RuntimeError: if passes do not reach the same experts modules.
        """
        if len(passes) > self._most:
            raise ValueError(f"at most {self._most} passes run at a time; got {len(passes)}")
        states = [_Pass(number) for number in range(len(passes))]
        for state, work in zip(states, passes, strict=True):
            self._threads.submit(self._thread, state, work)
        answers: Sequence[Any] = [None] * len(states)
        try:
            while True:
                asks = [self._resume(state, given) for state, given in zip(states, answers, strict=True)]
                if all(ask is None for ask in asks):
                    return [state.result for state in states]
                places = {None if ask is None else ask.place for ask in asks}
                if len(places) != 1:
                    raise RuntimeError(f"passes of one model reached different experts modules: {places}")
                answers = answer(places.pop(), [ask.what for ask in asks if ask is not None])
        except BaseException:
            for state in states:
                state.told.put(("stop", None))
            raise

    def _resume(self, state: _Pass, given: Any) -> Ask | None:
        """Let one pass go on to its next question; None at its end."""
        self.enter(state.number)
        state.told.put(("go", given))
        found = state.asked.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _thread(self, state: _Pass, work: Callable[[], Any]) -> None:
        kind, _ = state.told.get()
        if kind == "stop":
            return
        self._here.current = state
        try:
            state.result = work()
            state.asked.put(None)
        except PassStoppedError:
            pass
        except BaseException as error:
            state.asked.put(error)
        finally:
            self._here.current = None
