"""What a cache of the runtime would find at each step of a batch: the rules of a layer's call, on recorded routing.

All rows of a step ask at once. What is missing is read in the order in which the runtime reads it. Where a step needs
more experts than there are slots, computed ones make room; reads are then taken to end in the order of their start.
Deterministic, without torch. Shapes: A steps, T tokens, L MoE layers, K experts per token, E experts.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace

from .catalogue import make_cache
from .policies import Cache

Integer = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplayedSteps:
    """Rows of each expert at each step, and how many of the experts with rows were missing."""

    rows_ALE: Integer
    misses_AL: Integer

    @property
    def hit_rate(self) -> float:
        """Share of the experts with rows that were in slots, over all steps and layers."""
        used = int((self.rows_ALE > 0).sum())
        return 1 - int(self.misses_AL.sum()) / max(used, 1)

    def after(self, steps: int) -> "ReplayedSteps":
        """The same without the first steps, while which the cache fills."""
        return ReplayedSteps(rows_ALE=self.rows_ALE[steps:], misses_AL=self.misses_AL[steps:])


def replay_steps(trace: RoutingTrace, row_AT: Integer, num_slots: Sequence[int], policy: str) -> ReplayedSteps:
    """Carry steps out on paper, from empty slots.

    Args:
        trace: recorded routing.
        row_AT: rows of the trace that each step computes together.
        num_slots: RAM slots of each layer.
        policy: name in CACHES.

    Raises:
        ValueError: if the slots are not one number per layer, or the policy is unknown.
    """
    if len(num_slots) != trace.num_layers:
        raise ValueError(f"num_slots must give {trace.num_layers} layers; got {len(num_slots)}")
    steps, experts = len(row_AT), trace.num_experts
    rows_ALE = np.zeros((steps, trace.num_layers, experts), np.int64)
    misses_AL = np.zeros((steps, trace.num_layers), np.int64)
    for layer, slots in enumerate(num_slots):
        cache = make_cache(policy, slots, experts)
        for step, row_T in enumerate(row_AT):
            expert_TK = trace.expert_TLK[row_T, layer]
            rows_ALE[step, layer] = np.bincount(expert_TK[expert_TK >= 0], minlength=experts)
            needed = np.flatnonzero(rows_ALE[step, layer]).tolist()
            misses_AL[step, layer] = _call(cache, expert_TK.tolist(), needed, slots, has_all=slots >= experts)
    return ReplayedSteps(rows_ALE=rows_ALE, misses_AL=misses_AL)


def _call(cache: Cache, expert_TK: list[list[int]], needed: list[int], slots: int, *, has_all: bool) -> int:
    """One call of one layer, as `ExpertStep` makes it; how many experts were missing."""
    misses = [expert for expert in needed if expert not in cache.resident]
    if not has_all:
        for experts in expert_TK:
            cache.demand([expert for expert in dict.fromkeys(experts) if expert >= 0])
    misses.sort(key=cache.rank)
    if len(needed) <= slots:
        for expert in misses:
            _read(cache, expert, needed, slots)
    else:
        _read_in_waves(cache, misses, slots)
    return len(misses)


def _read(cache: Cache, expert: int, pinned: Sequence[int], slots: int) -> None:
    if len(cache.resident) >= slots:
        cache.evict(pinned)
    cache.insert(expert)


def _read_in_waves(cache: Cache, misses: list[int], slots: int) -> None:
    waiting, coming = deque(misses), deque[int]()
    while waiting and (len(cache.resident) < slots or len(coming) < max(1, slots // 2)):
        expert = waiting.popleft()
        _read(cache, expert, list(coming), slots)
        coming.append(expert)
    while waiting:
        cache.discard(coming.popleft())
        expert = waiting.popleft()
        _read(cache, expert, list(coming), slots)
        coming.append(expert)
