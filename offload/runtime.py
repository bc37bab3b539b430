"""The running model's side: finds experts in RAM slots, reads the missing ones, computes them as they land.

Order of one call of one layer: look all experts up, start reading all that are missing, compute those that are there,
compute the others in the order in which they arrive, combine in a fixed order. Slots that a call uses are not evicted
during that call.
"""

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .cache import ScoredCache, make_cache
from .compute import RoutedRows, can_group, eager_forward
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
        self.expert_bytes = self._record.layer.expert_bytes
        self.is_grouped = can_group(self._record.layer)
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

    def start_read(self, expert: int, pinned: Collection[int], landed: "SimpleQueue[Ticket]") -> Ticket:
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
            if not slots.is_grouped:
                return self._forward_eager(slots, module, x_TD, expert_TK, weight_TK)
            rows = RoutedRows(module, slots.num_experts, x_TD, expert_TK, weight_TK)
            ExpertStep(slots, self.counters, rows.num_rows).run(rows.compute)
            return rows.combine()

    def _forward_eager(
        self, slots: LayerSlots, module: Any, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        expert_ids, counts = expert_TK.unique(return_counts=True)
        num_rows = {
            expert: count
            for expert, count in zip(expert_ids.tolist(), counts.tolist(), strict=True)
            if 0 <= expert < slots.num_experts
        }
        with ExpertStep(slots, self.counters, num_rows) as step:
            return eager_forward(module, step.fetch, slots.num_experts, x_TD, expert_TK, weight_TK)


class ExpertStep:
    """One call of one layer: which experts it needs, and how many rows each of them has.

    `run` computes them in the order in which they are there; as a context, `fetch` gives one after the other.
    """

    def __init__(self, slots: LayerSlots, counters: Counters, num_rows: Mapping[int, int]) -> None:
        self._slots, self._num_rows, self._counters = slots, num_rows, counters
        self._landed: SimpleQueue[Ticket] = SimpleQueue()
        self._in_flight: dict[int, Ticket] = {}

    def run(self, compute: Callable[[int, Mapping[str, torch.Tensor]], None]) -> None:
        """Compute every needed expert once."""
        hits, misses = self._look_up()
        try:
            if self._fits:
                while misses:
                    self._read(misses.pop(0), pinned=self._num_rows)
            for expert in hits:
                self._compute(expert, compute)
            self._drain(misses, compute)
        finally:
            self._settle()

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
        return self._slots[expert]

    @property
    def _fits(self) -> bool:
        return len(self._num_rows) <= self._slots.num_slots

    def _look_up(self) -> tuple[list[int], list[int]]:
        """Hits, and misses with few rows first, so that the most used are the last to come and stay."""
        rising = sorted(self._num_rows, key=lambda expert: (self._num_rows[expert], expert))
        hits = [expert for expert in rising if expert in self._slots]
        misses = [expert for expert in rising if expert not in self._slots]
        for expert in rising:
            self._slots.cache.touch(expert)
        counters = self._counters.layers[self._slots.layer]
        counters.hits += len(hits)
        counters.misses += len(misses)
        counters.bytes_read += len(misses) * self._slots.expert_bytes
        return hits, misses

    def _drain(self, waiting: list[int], compute: Callable[[int, Mapping[str, torch.Tensor]], None]) -> None:
        """Compute experts as they land; those that are still waiting for a slot take the slots of computed ones."""
        slots, waiting = self._slots, waiting[::-1]
        while waiting and slots.num_free:
            self._read(waiting.pop(), pinned=())
        window = max(1, min(slots.num_slots // 2, len(waiting))) if waiting else 0
        while waiting and len(self._in_flight) < window:
            self._read(waiting.pop(), pinned=list(self._in_flight))
        while self._in_flight:
            expert = self._next_landed()
            self._compute(expert, compute)
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

    def _read(self, expert: int, pinned: Collection[int]) -> None:
        self._in_flight[expert] = self._slots.start_read(expert, pinned, self._landed)

    def _compute(self, expert: int, compute: Callable[[int, Mapping[str, torch.Tensor]], None]) -> None:
        started = time.perf_counter()
        compute(expert, self._slots[expert])
        self._counters.compute_s += time.perf_counter() - started


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
