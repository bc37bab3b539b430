"""The answer to one request as it comes: an iterator for threads, a callback for event loops."""

import threading
from collections import deque
from collections.abc import Callable, Iterator

from .events import Event, Finished, Position


class Stream:
    """Events of one request, from the engine's thread to one reader.

    Args:
        cancel: tells the engine to stop the request; may be called from any thread, and more than once.
        position: says how far the request is.
    """

    def __init__(self, cancel: Callable[[], None], position: Callable[[], Position]) -> None:
        self._cancel, self._position = cancel, position
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._reader: Callable[[Event], None] | None = None
        self._finished: Finished | None = None
        self._is_exhausted = False

    @property
    def finished(self) -> Finished | None:
        """How the request ended; None while it runs. Set before the reader gets the event."""
        return self._finished

    def position(self) -> Position:
        """How far the request is."""
        return self._position()

    def cancel(self) -> None:
        """Stop the request within one step of the model; afterwards comes `Finished`, if it had not ended before."""
        self._cancel()

    def next(self, timeout_s: float | None = None) -> Event:
        """The next event; waits for it.

        Args:
            timeout_s: seconds to wait; None waits for ever.

        Raises:
            TimeoutError: if there is none in time; the request goes on.
            StopIteration: after `Finished`.
        """
        with self._changed:
            if self._is_exhausted:
                raise StopIteration
            if not self._changed.wait_for(lambda: self._events, timeout_s):
                raise TimeoutError(f"no token within {timeout_s} s")
            event = self._events.popleft()
            self._is_exhausted = isinstance(event, Finished)
            return event

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        return self.next()

    def subscribe(self, reader: Callable[[Event], None]) -> None:
        """Give all events to a function instead of the iterator: those that wait at once, later ones as they come.

        Args:
            reader: called in the engine's thread, in order. It must not block; with asyncio it is
                `lambda event: loop.call_soon_threadsafe(queue.put_nowait, event)`. After it raised, for instance
                because its loop is closed, the request is cancelled.
        """
        # under the lock, so that an event of the engine's thread cannot overtake those that waited
        with self._changed:
            self._reader = reader
            while self._events and self._reader is not None:
                self._give(self._events.popleft())

    def put(self, event: Event) -> None:
        """One more event; the engine's side."""
        with self._changed:
            if isinstance(event, Finished):
                self._finished = event
            if self._reader is not None:
                self._give(event)
            else:
                self._events.append(event)
                self._changed.notify_all()

    def _give(self, event: Event) -> None:
        assert self._reader is not None
        try:
            self._reader(event)
        except Exception:  # whatever a reader raises, the engine's thread has other requests to serve
            self._reader = None
            self._cancel()
