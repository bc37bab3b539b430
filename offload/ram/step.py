"""One call of one layer: look all experts up, read the missing ones, compute those in slots and those that land.

The bookkeeping of a call changes in many steps. After an exception between two of them the runtime clears all slots,
so nothing here undoes anything.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from ..compute.fused_experts import FusedRows
from ..compute.layers.routed_experts import TokenExperts
from ..compute.layers.structs import EndingTerms
from ..compute.routed_rows import RoutedRows
from ..store.reading import Ticket, next_landed
from .counters import Counters
from .expanded import ExpandedWeights
from .slots import KernelSlots, LayerSlots

LEARN_FROM_TOKENS = 512
"""Tokens of a prefill that the cache policy sees, from the end: decoding goes on from these."""

Rows = RoutedRows | FusedRows


@dataclass(frozen=True)
class Found:
    """Which experts of a call are in their slots, and which have to be read, the least promising first."""

    hits: list[int]
    misses: list[int]


def compute_hits(slots: LayerSlots, counters: Counters, rows: FusedRows, expert_TK: torch.Tensor) -> bool:
    """What `ExpertStep` does for fused rows, if all of their experts are in slots; else False, and nothing is done.

    Without misses there is nothing to order or to wait for, and that saves most of what surrounds the products.
    """
    started = time.perf_counter()
    experts = list(rows.num_rows)
    matrices = slots.all_of(experts)
    if not matrices:
        return False
    _learn(slots, expert_TK)
    counters.layers[slots.layer].hits += len(experts)
    rows.compute_several(experts, matrices)
    counters.compute_s += time.perf_counter() - started
    return True


class TokenStep:
    """What `compute_hits` does for one token, and the sum of its experts, by one call of C.

    Args:
        slots: the layer's RAM slots.
        counters: receives hits and seconds.
        experts: the layer's kernel, with the addresses that the slots keep.
    """

    def __init__(self, slots: LayerSlots, counters: Counters, experts: TokenExperts) -> None:
        self._slots, self._counters, self.experts = slots, counters, experts

    def __call__(
        self, x: int, expert_1K: torch.Tensor, weight: int, ending: EndingTerms | None, added_to: int | None, out: int
    ) -> bool:
        """Whether the token is computed; else nothing is done.

        Args:
            x, weight, ending, added_to, out: as for `TokenExperts`.
            expert_1K: the token's experts.
        """
        started, slots, counters = time.perf_counter(), self._slots, self._counters
        if not slots.is_settled or not self.experts(x, expert_1K.data_ptr(), weight, ending, added_to, out):
            return False
        if not slots.has_all:
            slots.use(expert_1K[0].tolist())
        counters.layers[slots.layer].hits += self.experts.top_k
        counters.compute_s += time.perf_counter() - started
        return True


def _learn(slots: LayerSlots, expert_TK: torch.Tensor) -> None:
    """Tell the cache policy of the last tokens; nothing where no expert ever has to go."""
    if slots.has_all:
        return
    for experts in expert_TK[-LEARN_FROM_TOKENS:].tolist():
        slots.use([expert for expert in dict.fromkeys(experts) if 0 <= expert < slots.num_experts])


class ExpertStep:
    """One call of one layer: which experts it needs, and how many rows each of them has.

    Rows that are grouped by expert are computed by `begin` and `finish`, in the order in which experts are there. A
    model's own loop asks for one expert after the other: `prepare`, then `fetch`.

    Args:
        slots: the layer's RAM slots.
        weights: what to compute with: what is in the slots, as tensors, as our C reads it, or expanded.
        counters: receives hits, misses and seconds.
        num_rows: rows of each expert that is needed.
        expert_TK: the experts of each token; ids outside 0..E-1 are left out.
    """

    def __init__(
        self,
        slots: LayerSlots,
        weights: LayerSlots | KernelSlots | ExpandedWeights,
        counters: Counters,
        num_rows: Mapping[int, int],
        expert_TK: torch.Tensor,
    ) -> None:
        self._slots, self._weights, self._num_rows, self._counters = slots, weights, num_rows, counters
        self._expert_TK = expert_TK
        self._landed: SimpleQueue[Ticket] = SimpleQueue()
        self._in_flight: dict[int, int] = {}
        self._hits: list[int] = []

    def begin(self, rows: Rows) -> None:
        """Go on until every missing expert is in its slot or on its way there.

        With a slot for each expert that is at once, and `finish` computes. With fewer, experts are computed in waves,
        because the reads that are left wait for the slots of computed ones.
        """
        found = self._look_up()
        if self._fits:
            self._hits = found.hits
            self._read(found.misses, pinned=self._num_rows)
        else:
            self._compute_in_waves(rows, found)

    def finish(self, rows: Rows) -> None:
        """Compute what `begin` has left, experts that land as they land."""
        if not self._fits:
            while self._in_flight:
                self._timed(rows.compute, self._next_landed())
            return
        self._start_hits(rows, self._hits)
        while self._in_flight:
            self._timed(rows.start, self._next_landed())
        rows.gate()
        for expert in self._num_rows:
            self._timed(rows.finish, expert)

    def prepare(self) -> None:
        """Start to read what is missing, if there is a slot for each expert."""
        found = self._look_up()
        if self._fits:
            self._read(found.misses, pinned=self._num_rows)

    def fetch(self, expert: int) -> Mapping[str, Any]:
        """The weights of one needed expert; they stay until another is fetched."""
        if not self._slots.has_started(expert):
            # a read ahead that has turned out to be needed still writes to its slot, which must not go to this expert
            while len(self._in_flight) >= self._slots.capacity(self._num_rows):
                self._next_landed()
            self._read([expert], pinned=list(self._in_flight))
        while expert in self._in_flight:
            self._next_landed()
        return self._weights[expert]

    def _compute_in_waves(self, rows: Rows, found: Found) -> None:
        """Experts that wait take the slots of computed ones; reads hold at most half of the slots at a time."""
        slots, waiting = self._slots, found.misses[::-1]
        for expert in found.hits:
            self._timed(rows.compute, expert)
        capacity = slots.capacity(self._num_rows)
        while waiting and slots.num_free and len(self._in_flight) < capacity:
            self._read([waiting.pop()], pinned=list(self._in_flight))
        window = max(1, capacity // 2)
        while waiting and len(self._in_flight) < window:
            self._read([waiting.pop()], pinned=list(self._in_flight))
        while waiting:
            expert = self._next_landed()
            self._timed(rows.compute, expert)
            # safe: it has landed and is computed, and the CPU's products are over when they return
            slots.release(expert)
            self._read([waiting.pop()], pinned=list(self._in_flight))

    def _start_hits(self, rows: Rows, hits: list[int]) -> None:
        started = time.perf_counter()
        several = [self._weights[expert] for expert in hits] if self._weights.holds_several else []
        if not (several and rows.compute_several(hits, several)):
            for expert in hits:
                rows.start(expert, self._weights[expert])
        self._counters.compute_s += time.perf_counter() - started

    @property
    def _fits(self) -> bool:
        return self._slots.holds(self._num_rows)

    def _look_up(self) -> Found:
        """What is there and what is not; misses worth keeping come last, so that they are evicted last."""
        cache = self._slots.cache
        self._in_flight.update(self._slots.settle_ahead(self._num_rows, self._landed))
        hits = [each for each in self._num_rows if self._slots.is_ready(each) and each not in self._in_flight]
        misses = [expert for expert in self._num_rows if not self._slots.has_started(expert)]
        _learn(self._slots, self._expert_TK)
        if len(misses) > 1:
            misses.sort(key=cache.rank)
        counters = self._counters.layers[self._slots.layer]
        counters.hits += len(hits)
        counters.misses += len(self._num_rows) - len(hits)
        counters.bytes_read += self._slots.bytes_of(misses)
        return Found(hits, misses)

    def _next_landed(self) -> int:
        started = time.perf_counter()
        wanted = f"one of the experts {sorted(self._in_flight)[:8]} of MoE layer {self._slots.layer}"
        while True:
            expert = next_landed(self._landed, wanted).expert
            self._in_flight[expert] -= 1
            if not self._in_flight[expert]:
                break
        del self._in_flight[expert]
        self._slots.complete(expert)
        self._counters.stall_s += time.perf_counter() - started
        return expert

    def _read(self, experts: Sequence[int], pinned: Collection[int]) -> None:
        for expert, num_landing in self._slots.start_reads(experts, pinned, self._landed).items():
            self._in_flight[expert] = self._in_flight.get(expert, 0) + num_landing

    def _timed(self, compute: Callable[[int, Mapping[str, Any]], None], expert: int) -> None:
        started = time.perf_counter()
        compute(expert, self._weights[expert])
        self._counters.compute_s += time.perf_counter() - started
