"""Which experts stay in fast memory: eviction policies as small state machines, without torch.

A cache holds at most `capacity` keys. A key is an expert id (one cache per layer) or layer * E + expert (one cache for
all layers). Every policy gives each key a score that changes only when the key is touched, and evicts the lowest score
(ties: the least recently touched), so one lazy heap serves them all.
"""

import heapq
from collections.abc import Collection, Sequence

NEVER = 1 << 62


class ScoredCache:
    """A set of at most `capacity` keys that evicts the key with the lowest score.

    Args:
        capacity: keys it can hold, at least 1.

    Raises:
        ValueError: if capacity < 1.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a cache needs room for at least 1 expert; got capacity {capacity}")
        self.capacity = capacity
        self._time = 0
        self._entry: dict[int, tuple[float, int]] = {}
        self._resident: set[int] = set()
        self._heap: list[tuple[float, int, int]] = []

    def __contains__(self, key: int) -> bool:
        return key in self._resident

    def __len__(self) -> int:
        return len(self._resident)

    @property
    def resident(self) -> Collection[int]:
        return self._resident

    def touch(self, key: int, next_use: int = NEVER, weight: float = 1.0) -> None:
        """Note that `key` is used now, whether or not it is resident.

        Args:
            key: the expert.
            next_use: when it will be used again, for policies that know the future.
            weight: router weight of this use, for policies that look at it.
        """
        self._time += 1
        entry = (self._score(key, next_use, weight), self._time)
        self._entry[key] = entry
        if key in self._resident:
            heapq.heappush(self._heap, (*entry, key))
            self._compact()

    def insert(self, key: int) -> None:
        """Make `key`, which was touched before, resident; there must be room."""
        if len(self._resident) >= self.capacity:
            raise RuntimeError(f"cache of {self.capacity} is full; evict before inserting {key}")
        self._resident.add(key)
        heapq.heappush(self._heap, (*self._entry[key], key))

    def evict(self, pinned: Collection[int] = ()) -> int:
        """Remove and return the key with the lowest score; keys in `pinned` go only when there is no other."""
        kept: list[tuple[float, int, int]] = []
        victim = None
        while self._heap:
            score, time, key = heapq.heappop(self._heap)
            if key not in self._resident or self._entry[key] != (score, time):
                continue
            if key in pinned:
                kept.append((score, time, key))
                continue
            victim = key
            break
        if victim is None:
            if not kept:
                raise RuntimeError("nothing to evict: the cache is empty")
            victim = kept.pop(0)[2]
        for entry in kept:
            heapq.heappush(self._heap, entry)
        self._resident.discard(victim)
        return victim

    def discard(self, key: int) -> None:
        """Forget that `key` is resident, for example because reading it failed."""
        self._resident.discard(key)

    def access(self, keys: Sequence[int], next_uses: Sequence[int] = (), weights: Sequence[float] = ()) -> int:
        """One token at one layer: look all keys up, then insert them.

        Returns:
            How many of the keys were resident before the first was inserted.
        """
        hits = sum(key in self._resident for key in keys)
        for position, key in enumerate(keys):
            self.touch(
                key,
                next_uses[position] if next_uses else NEVER,
                weights[position] if weights else 1.0,
            )
            if key not in self._resident:
                if len(self._resident) >= self.capacity:
                    self.evict(pinned=keys)
                self.insert(key)
        return hits

    def _score(self, key: int, next_use: int, weight: float) -> float:
        raise NotImplementedError

    def _compact(self) -> None:
        if len(self._heap) > 64 + 4 * self.capacity:
            self._heap = [(*self._entry[key], key) for key in self._resident]
            heapq.heapify(self._heap)


class LRU(ScoredCache):
    """Evicts the least recently used expert."""

    def _score(self, key: int, next_use: int, weight: float) -> float:
        return self._time


class LFU(ScoredCache):
    """Evicts the least often used expert, counting uses since the start, resident or not."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._uses: dict[int, int] = {}

    def _score(self, key: int, next_use: int, weight: float) -> float:
        self._uses[key] = self._uses.get(key, 0) + 1
        return self._uses[key]


class Belady(ScoredCache):
    """Evicts the expert whose next use is farthest away: the best that any policy can do, and only in simulation.

    Source: Belady 1966, "A study of replacement algorithms for a virtual-storage computer".
    """

    def _score(self, key: int, next_use: int, weight: float) -> float:
        return -next_use


CACHES: dict[str, type[ScoredCache]] = {"lru": LRU, "lfu": LFU, "belady": Belady}
ORACLES = frozenset({"belady"})


def make_cache(policy: str, capacity: int) -> ScoredCache:
    """A cache by the name of its policy.

    Raises:
        ValueError: if no policy has this name; the message lists those there are.
    """
    if policy not in CACHES:
        raise ValueError(f"unknown cache policy {policy!r}; there are {', '.join(sorted(CACHES))}")
    return CACHES[policy](capacity)
