"""Which experts stay in fast memory: eviction policies as small state machines, without torch.

A cache holds at most `capacity` keys. A key is an expert id (one cache per layer) or layer * E + expert (one cache for
all layers). Every policy gives each key a score that changes only when the key is touched, and evicts the lowest score
(ties: the least recently touched), so one lazy heap serves them all; only LearnedReuse computes all scores for every
token.
"""

import heapq
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np

from routing.traces import NEVER


class Cache(Protocol):
    """What every policy offers: a set of at most `capacity` keys that knows whom to evict."""

    capacity: int

    def __contains__(self, key: int) -> bool: ...

    def __len__(self) -> int: ...

    @property
    def resident(self) -> Collection[int]:
        """The keys that are in fast memory."""

    def demand(self, keys: Sequence[int], next_uses: Sequence[int] = (), weights: Sequence[float] = ()) -> None:
        """One token uses `keys`, whether or not they are resident; nothing is inserted yet."""

    def access(self, keys: Sequence[int], next_uses: Sequence[int] = (), weights: Sequence[float] = ()) -> int:
        """One token at one layer: look all keys up, then insert them; gives the number of hits."""

    def rank(self, key: int) -> tuple[float, float]:
        """How promising a key would be if it were resident; higher stays longer."""

    def discard(self, key: int) -> None:
        """Make a key not resident, whatever its score."""

    def insert(self, key: int) -> None:
        """Make a key resident; there must be room."""

    def evict(self, pinned: Collection[int] = ()) -> int:
        """Remove the least valuable key that is not pinned, and return it."""


class ScoredCache:
    """A set of at most `capacity` keys that evicts the key with the lowest score.

    Args:
        capacity: keys it can hold, at least 1.

    Raises:
        ValueError: if capacity < 1.
    """

    def __init__(self, capacity: int) -> None:
        expect_room(capacity)
        self.capacity = capacity
        self._time = self._tokens = 0
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

    def demand(self, keys: Sequence[int], next_uses: Sequence[int] = (), weights: Sequence[float] = ()) -> None:
        """One token uses `keys`, whether or not they are resident; nothing is inserted yet.

        Args:
            keys: the experts, each once.
            next_uses: when each will be used again, for policies that know the future.
            weights: router weight of each, for policies that look at it.
        """
        self._tokens += 1
        for position, key in enumerate(keys):
            self._touch(
                key,
                next_uses[position] if next_uses else NEVER,
                weights[position] if weights else 1.0,
            )

    def _touch(self, key: int, next_use: int, weight: float) -> None:
        self._time += 1
        entry = (self._score(key, next_use, weight), self._time)
        self._entry[key] = entry
        if key in self._resident:
            heapq.heappush(self._heap, (*entry, key))
            self._compact()

    def rank(self, key: int) -> tuple[float, float]:
        """How much a key is worth keeping: a higher rank is evicted later."""
        return self._entry.get(key, (-math.inf, 0))

    def insert(self, key: int) -> None:
        """Make `key` resident; there must be room."""
        if len(self._resident) >= self.capacity:
            raise RuntimeError(f"cache of {self.capacity} is full; evict before inserting {key}")
        self._resident.add(key)
        heapq.heappush(self._heap, (*self._entry.setdefault(key, (-math.inf, 0)), key))

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
        return access(self, keys, next_uses, weights)

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


class StaticHotList(LFU):
    """Keeps the experts that were used most in the first tokens, and never changes its mind; what else is needed passes
    through the slot of the least used."""

    WARM_UP = 256
    """Tokens that choose the set. At 256 it loses to every other policy on both stretches of the trace in
    experiments/records/2026-11-29_cache-policies; other lengths were not tried."""

    def _score(self, key: int, next_use: int, weight: float) -> float:
        if self._tokens > self.WARM_UP:
            return self._uses.get(key, 0)
        return super()._score(key, next_use, weight)


def evict_lowest(resident: set[int], pinned: Collection[int], rank: Callable[[int], Any]) -> int:
    """Remove and return the key of the lowest rank; keys in `pinned` go only when there is no other.

    Raises:
        RuntimeError: if there is no key.
    """
    candidates = [key for key in resident if key not in pinned] or list(resident)
    if not candidates:
        raise RuntimeError("nothing to evict: the cache is empty")
    victim = min(candidates, key=rank)
    resident.discard(victim)
    return victim


class SearchedCache(ScoredCache):
    """Keys whose ranks all change with every token or pass, so that there is no heap: the lowest is searched."""

    def evict(self, pinned: Collection[int] = ()) -> int:
        return evict_lowest(self._resident, pinned, self.rank)

    def _score(self, key: int, next_use: int, weight: float) -> float:
        return 0.0


class ActivationAware(SearchedCache):
    """Evicts the expert that the most similar stretches of the past use least.

    A stretch is `STRETCH` tokens. Its activation counts are matched by cosine similarity with the finished ones. An
    expert's worth is its share in the stretch so far plus that in the best match. A cache of one layer sees that
    layer's row of the activation matrix only.

    Source: Xue et al. 2024 (MoE-Infinity), arXiv:2401.14361, section 5.
    """

    STRETCH, MOST_STRETCHES = 32, 64
    """Tokens of a stretch (the paper's are whole sequences) and how many are remembered. Shorter ones follow a change
    of subject sooner and count less surely. Tried at these values only
    (experiments/records/2026-11-29_cache-policies)."""

    def __init__(self, capacity: int, num_keys: int) -> None:
        super().__init__(capacity)
        self._now = np.zeros(num_keys)
        self._past: list[np.ndarray] = []
        self._worth = np.zeros(num_keys)

    def demand(self, keys: Sequence[int], next_uses: Sequence[int] = (), weights: Sequence[float] = ()) -> None:
        if self._tokens and self._tokens % self.STRETCH == 0:
            self._past = [*self._past, self._now / np.linalg.norm(self._now)][-self.MOST_STRETCHES :]
            self._now = np.zeros_like(self._now)
        self._now[list(keys)] += 1
        share = self._now / np.linalg.norm(self._now)
        match = max(self._past, key=share.dot) if self._past else 0.0
        self._worth = share + match
        super().demand(keys, next_uses, weights)

    def rank(self, key: int) -> tuple[float, float]:
        return float(self._worth[key]), self._entry.get(key, (0.0, 0))[1]


class Belady(ScoredCache):
    """Evicts the expert whose next use is farthest away: the best that any policy can do, and only in simulation.

    Source: Belady 1966, "A study of replacement algorithms for a virtual-storage computer".
    """

    def _score(self, key: int, next_use: int, weight: float) -> float:
        return -next_use


class DecayedFrequency(ScoredCache):
    """Evicts the expert with the least uses, where a use counts half after 11 tokens and less ever after.

    All scores shrink alike between uses, so instead of shrinking them, new uses weigh more; scores are logarithms.
    """

    DECAY = 0.94
    """Share of a score that is left after one token: a half-life of 11 tokens, between the recency of `lru` and the
    frequency of `lfu`. Compared with both in experiments/records/2026-11-29_cache-policies; tried on that trace
    only."""

    def _score(self, key: int, next_use: int, weight: float) -> float:
        now = -self._tokens * math.log(self.DECAY)
        before = self._entry.get(key, (-math.inf, 0))[0]
        return now if before == -math.inf else now + math.log1p(math.exp(before - now))


def access(cache: Cache, keys: Sequence[int], next_uses: Sequence[int], weights: Sequence[float]) -> int:
    """One token at one layer: look all keys up, then insert them.

    Returns:
        How many of the keys were resident before the first was inserted.
    """
    hits = sum(key in cache for key in keys)
    cache.demand(keys, next_uses, weights)
    for key in keys:
        if key not in cache:
            if len(cache) >= cache.capacity:
                cache.evict(pinned=keys)
            cache.insert(key)
    return hits


def expect_room(capacity: int) -> None:
    if capacity < 1:
        raise ValueError(f"a cache needs room for at least 1 expert; got capacity {capacity}")
