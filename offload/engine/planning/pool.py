"""Who gets in: tokens of the KV pool, the queue before it, and when a place is free. Without torch."""

from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class Owned(Protocol):
    """What waits: something that somebody asked for."""

    @property
    def owner(self) -> str: ...


Item = TypeVar("Item", bound=Owned)

LONGEST_RETRY_S = 120.0
"""Clients of the OpenAI and Anthropic libraries ignore a longer `Retry-After`."""
MEMORY = 0.7
"""Weight of the past in the average time between two ends: about three requests, so that it follows a change of load;
not tuned."""


class TokenPool:
    """Places for tokens' keys and values, as many as the memory budget holds.

    A request reserves all places that it can need before it starts, so that none is ever thrown out half-way: reading
    its prompt again would read nearly all experts again. Kept prefixes take what is free, and give way.

    Args:
        capacity: tokens.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._taken: dict[int, int] = {}
        self.kept = 0
        """Tokens of kept prefixes."""

    @property
    def reserved(self) -> int:
        """Tokens that running requests have reserved."""
        return sum(self._taken.values())

    @property
    def free(self) -> int:
        return self.capacity - self.reserved - self.kept

    def take(self, key: int, tokens: int) -> None:
        """Reserve places for one request.

        Raises:
            ValueError: if there are not so many, or the request has some already.
        """
        if key in self._taken or tokens > self.free:
            raise ValueError(f"request {key} cannot take {tokens} tokens; {self.free} of {self.capacity} are free")
        self._taken[key] = tokens

    def give(self, key: int) -> None:
        """Free the places of one request; nothing if it has none."""
        self._taken.pop(key, None)


class FairQueue(Generic[Item]):
    """A queue in which owners take turns, and each owner's requests keep their order."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[Item]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, item: Item) -> None:
        self._queues.setdefault(item.owner, deque()).append(item)

    def remove(self, item: Item) -> bool:
        """Take one out, wherever it stands; whether it was there."""
        queue = self._queues.get(item.owner, deque())
        if item not in queue:
            return False
        queue.remove(item)
        if not queue:
            del self._queues[item.owner]
        return True

    def serve(self, item: Item) -> None:
        """Take one out because its turn has come: its owner goes to the end of the round."""
        if self.remove(item) and item.owner in self._queues:
            self._queues.move_to_end(item.owner)

    def __iter__(self) -> Iterator[Item]:
        """Everything that waits, in the order in which it would be served."""
        rounds = [list(queue) for queue in self._queues.values()]
        for place in range(max(map(len, rounds), default=0)):
            yield from (queue[place] for queue in rounds if place < len(queue))


class Departures:
    """When the next request ends and leaves its place, from when the last ones ended.

    Args:
        began_s: when serving began.
    """

    def __init__(self, began_s: float) -> None:
        self._last_s, self._gap_s = began_s, 0.0

    def note_start(self, now_s: float, *, is_first: bool) -> None:
        """A request begins; the idle time before the first one says nothing."""
        if is_first:
            self._last_s = now_s

    def note_end(self, now_s: float) -> None:
        """A request has left."""
        gap_s = now_s - self._last_s
        self._gap_s = MEMORY * self._gap_s + (1 - MEMORY) * gap_s if self._gap_s else gap_s
        self._last_s = now_s

    def expected_s(self, now_s: float) -> float:
        """Seconds until one leaves, 1 to 120: the rest of the usual time between two, or as long as it has taken."""
        waited_s = now_s - self._last_s
        left_s = self._gap_s - waited_s if self._gap_s > waited_s else max(waited_s, self._gap_s)
        return min(max(left_s, 1.0), LONGEST_RETRY_S)
