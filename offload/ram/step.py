"""One call of one layer: look all experts up, read what is missing, compute what is there and what lands."""

import time
from collections.abc import Callable, Collection, Mapping
from queue import SimpleQueue

import torch

from ..compute.routed_rows import RoutedRows
from ..compute.single_token import TokenRows
from ..store.reading import Ticket
from .counters import Counters
from .expanded import ExpandedWeights
from .slots import LayerSlots

LEARN_FROM_TOKENS = 512


class ExpertStep:
    """One call of one layer: which experts it needs, and how many rows each of them has.

    `weights` gives their weights to compute with: the slots themselves, or what is in them, expanded.

    `run` computes them in the order in which they are there; as a context, `fetch` gives one after the other.
    """

    def __init__(
        self,
        slots: LayerSlots,
        weights: LayerSlots | ExpandedWeights,
        counters: Counters,
        num_rows: Mapping[int, int],
        expert_TK: torch.Tensor,
    ) -> None:
        self._slots, self._weights, self._num_rows, self._counters = slots, weights, num_rows, counters
        self._expert_TK = expert_TK
        self._landed: SimpleQueue[Ticket] = SimpleQueue()
        self._in_flight: dict[int, Ticket] = {}

    def run(self, rows: RoutedRows | TokenRows, reads_started: Callable[[], None] = lambda: None) -> None:
        """Compute every needed expert once; `reads_started` is called when no more reads are waiting for slots."""
        hits, misses = self._look_up()
        try:
            if self._fits:
                self._run_together(rows, hits, misses, reads_started)
            else:
                self._run_in_waves(rows, hits, misses, reads_started)
        finally:
            self._settle()

    def _run_together(
        self, rows: RoutedRows | TokenRows, hits: list[int], misses: list[int], reads_started: Callable[[], None]
    ) -> None:
        """All experts are held until the end; each is computed as far as possible when it is there."""
        for expert in misses:
            self._read(expert, pinned=self._num_rows)
        reads_started()
        self._start_hits(rows, hits)
        while self._in_flight:
            self._timed(rows.start, self._next_landed())
        rows.gate()
        for expert in self._num_rows:
            self._timed(rows.finish, expert)

    def _start_hits(self, rows: RoutedRows | TokenRows, hits: list[int]) -> None:
        started = time.perf_counter()
        several = [self._weights[expert] for expert in hits] if self._weights.holds_several else []
        if not (several and rows.compute_singles(hits, several)):
            for expert in hits:
                rows.start(expert, self._weights[expert])
        self._counters.compute_s += time.perf_counter() - started

    def _run_in_waves(
        self, rows: RoutedRows | TokenRows, hits: list[int], misses: list[int], reads_started: Callable[[], None]
    ) -> None:
        """Fewer slots than experts: those that wait take the slots of computed ones, at most half of the slots."""
        slots, waiting = self._slots, misses[::-1]
        for expert in hits:
            self._timed(rows.compute, expert)
        while waiting and slots.num_free:
            self._read(waiting.pop(), pinned=())
        window = max(1, slots.num_slots // 2)
        while waiting and len(self._in_flight) < window:
            self._read(waiting.pop(), pinned=list(self._in_flight))
        if not waiting:
            reads_started()
        while self._in_flight:
            expert = self._next_landed()
            self._timed(rows.compute, expert)
            if waiting:
                slots.release(expert)
                self._read(waiting.pop(), pinned=list(self._in_flight))
                if not waiting:
                    reads_started()

    def __enter__(self) -> "ExpertStep":
        _, misses = self._look_up()
        if self._fits:
            for expert in misses:
                self._read(expert, pinned=self._num_rows)
        return self

    def __exit__(self, *error: object) -> None:
        self._settle()

    def fetch(self, expert: int) -> Mapping[str, torch.Tensor]:
        """The weights of one needed expert; they stay until another is fetched."""
        if expert not in self._slots:
            self._read(expert, pinned=())
        while expert in self._in_flight:
            self._next_landed()
        return self._weights[expert]

    @property
    def _fits(self) -> bool:
        return len(self._num_rows) <= self._slots.num_slots

    def _look_up(self) -> tuple[list[int], list[int]]:
        """Hits, and misses with the least promising first, so that those worth keeping are the last to come."""
        cache = self._slots.cache
        self._in_flight.update(self._slots.settle_ahead(self._num_rows, self._landed))
        hits = [expert for expert in self._num_rows if expert in self._slots and expert not in self._in_flight]
        misses = [expert for expert in self._num_rows if expert not in self._slots]
        for experts in self._expert_TK[-LEARN_FROM_TOKENS:].tolist():
            cache.demand([expert for expert in dict.fromkeys(experts) if 0 <= expert < self._slots.num_experts])
        if len(misses) > 1:
            misses.sort(key=cache.rank)
        counters = self._counters.layers[self._slots.layer]
        counters.hits += len(hits)
        counters.misses += len(misses) + len(self._in_flight)
        counters.bytes_read += len(misses) * self._slots.expert_bytes
        return hits, misses

    def _next_landed(self) -> int:
        started = time.perf_counter()
        ticket = self._landed.get()
        self._counters.stall_s += time.perf_counter() - started
        del self._in_flight[ticket.expert]
        if ticket.error is not None:
            self._slots.release(ticket.expert)
            raise OSError(
                f"reading expert {ticket.expert} of MoE layer {ticket.layer} failed: {ticket.error}"
            ) from ticket.error
        return ticket.expert

    def _settle(self) -> None:
        """After an error: wait for what is still being read and forget it, so that no slot is written later."""
        for expert, ticket in self._in_flight.items():
            ticket.is_cancelled = True
            ticket.wait()
            self._slots.release(expert)
        self._in_flight.clear()

    def _read(self, expert: int, pinned: Collection[int]) -> None:
        self._in_flight[expert] = self._slots.start_read(expert, pinned, self._landed)

    def _timed(self, compute: Callable[[int, Mapping[str, torch.Tensor]], None], expert: int) -> None:
        started = time.perf_counter()
        compute(expert, self._weights[expert])
        self._counters.compute_s += time.perf_counter() - started
