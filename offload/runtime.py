"""The running model's side: finds each layer's experts in RAM slots, reads the missing ones, computes them as they land.

Order of one call of one layer: look all experts up, start reading all that are missing, compute those that are there,
compute the others in the order in which they arrive, combine in a fixed order. Slots that a call uses are not evicted
during that call.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .cache import ScoredCache, make_cache
from .compute import RoutedRows
from .counters import Counters, LayerCounters
from .reading import Ticket
from .store import ExpertStore, Slots
from .tracing import TraceRecorder

IMPLEMENTATION = "expertier_offload"


@dataclass(eq=False)
class Resident:
    """An expert in a slot."""

    slot: int
    weights: dict[str, torch.Tensor]


class LayerSlots:
    """The RAM slots of one layer: which expert is where, and which goes when another needs the room.

    Args:
        store: where experts are read from.
        layer: number of the MoE layer.
        num_slots: experts that fit.
        policy: name in CACHES.
    """

    def __init__(self, store: ExpertStore, layer: int, num_slots: int, policy: str) -> None:
        self.layer, self.num_slots = layer, num_slots
        self.num_experts = store.records[layer].layer.num_experts
        self._store, self._record = store, store.records[layer]
        self._slots = Slots(num_slots, self._record.slot_bytes)
        self._free = list(range(num_slots))[::-1]
        self._resident: dict[int, Resident] = {}
        self.cache: ScoredCache = make_cache(policy, num_slots)

    def __contains__(self, expert: int) -> bool:
        return expert in self._resident

    def __getitem__(self, expert: int) -> dict[str, torch.Tensor]:
        return self._resident[expert].weights

    @property
    def num_free(self) -> int:
        return len(self._free)

    def start_read(self, expert: int, pinned: Sequence[int], landed: "SimpleQueue[Ticket]") -> Ticket:
        """Take a slot, evicting if there is no free one, and start reading an expert into it."""
        if not self._free:
            self.release(self.cache.evict(pinned))
        slot = self._free.pop()
        ticket, shifts = self._store.read(self.layer, expert, slot, self._slots, landed)
        self._resident[expert] = Resident(slot, self._record.views(self._slots.slot(slot), shifts))
        self.cache.insert(expert)
        return ticket

    def release(self, expert: int) -> None:
        """Give an expert's slot back; it must not be in use or being read."""
        self._free.append(self._resident.pop(expert).slot)
        self.cache.discard(expert)


class OffloadRuntime:
    """All layers of one offloaded model.

    Args:
        store: the SSD tier.
        num_slots: RAM slots of each layer.
        policy: name in CACHES.
        recorder: records the routing, or None.
    """

    def __init__(
        self, store: ExpertStore, num_slots: Sequence[int], policy: str, recorder: TraceRecorder | None
    ) -> None:
        self.store = store
        self.layers = [LayerSlots(store, layer, count, policy) for layer, count in enumerate(num_slots)]
        self.counters = Counters([LayerCounters() for _ in self.layers])
        self.recorder = recorder
        self._lock = threading.RLock()

    def forward(
        self, layer: int, module: Any, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        """The experts' output for one layer, `[T, D]`."""
        with self._lock, torch.no_grad():
            if self.recorder is not None:
                self.recorder.note(layer, expert_TK, weight_TK)
            slots = self.layers[layer]
            rows = RoutedRows(module, slots.num_experts, x_TD, expert_TK, weight_TK)
            _ExpertStep(slots, self.counters, rows).run()
            return rows.combine()


class _ExpertStep:
    """One call of one layer."""

    def __init__(self, slots: LayerSlots, counters: Counters, rows: RoutedRows) -> None:
        self._slots, self._rows, self._counters = slots, rows, counters
        self._landed: SimpleQueue[Ticket] = SimpleQueue()
        self._in_flight: dict[int, Ticket] = {}

    def run(self) -> None:
        slots, needed = self._slots, list(self._rows.span)
        hits = [expert for expert in needed if expert in slots]
        misses = sorted((expert for expert in needed if expert not in slots), key=self._num_rows)
        self._count(len(hits), len(misses))
        for expert in sorted(needed, key=self._num_rows):
            slots.cache.touch(expert)
        try:
            if len(needed) <= slots.num_slots:
                while misses:
                    self._read(misses.pop(0), pinned=needed)
            for expert in hits:
                self._compute(expert)
            self._drain(misses)
        finally:
            self._settle()

    def _drain(self, waiting: list[int]) -> None:
        """Compute experts as they land; those that are still waiting for a slot take the slots of computed ones."""
        slots, waiting = self._slots, waiting[::-1]
        while waiting and slots.num_free:
            self._read(waiting.pop(), pinned=())
        window = max(1, min(slots.num_slots // 2, len(waiting))) if waiting else 0
        while waiting and len(self._in_flight) < window:
            self._read(waiting.pop(), pinned=list(self._in_flight))
        while self._in_flight:
            expert = self._next_landed()
            self._compute(expert)
            if waiting:
                slots.release(expert)
                self._read(waiting.pop(), pinned=list(self._in_flight))

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

    def _read(self, expert: int, pinned: Sequence[int]) -> None:
        self._in_flight[expert] = self._slots.start_read(expert, pinned, self._landed)

    def _compute(self, expert: int) -> None:
        started = time.perf_counter()
        self._rows.compute(expert, self._slots[expert])
        self._counters.compute_s += time.perf_counter() - started

    def _num_rows(self, expert: int) -> int:
        start, stop = self._rows.span[expert]
        return stop - start

    def _count(self, hits: int, misses: int) -> None:
        counters = self._counters.layers[self._slots.layer]
        counters.hits += hits
        counters.misses += misses
        counters.bytes_read += misses * self._slots._record.layer.expert_bytes


def offloaded_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts function `expertier_offload` of transformers' experts interface."""
    place = getattr(self, "_expertier_place", None)
    if place is None:
        raise ValueError(
            f'experts_implementation="{IMPLEMENTATION}" needs a model that was loaded by offload.load(); '
            f"this {type(self).__name__} was not"
        )
    runtime, layer = place
    result: torch.Tensor = runtime.forward(layer, self, hidden_states, top_k_index, top_k_weights)
    return result


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, offloaded_experts_forward)
