"""Visits some experts of a layer, each once: those in slots first, the others as they land from the disk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from ...ram.expanded import ExpandedWeights, make_rooms
from ...ram.slots import LayerSlots
from ...store.reading import Ticket, next_landed
from ...store.store import ExpertStore


@dataclass
class Traffic:
    """What a step moved.

    Args:
        hits, misses: experts that were in a slot when a layer asked for them, and that were not.
        bytes_read, bytes_written: of experts, from and to the disk or its page cache.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0


class ExpertVisits:
    """The RAM slots of all layers, for callers that need every expert of a layer for a moment.

    Args:
        store: reads experts; closed by `close`.
        num_slots: slots of each layer.
    """

    def __init__(self, store: ExpertStore, num_slots: Sequence[int]) -> None:
        self._store = store
        self.layers = [LayerSlots(store, layer, count, "lru") for layer, count in enumerate(num_slots)]
        self._rooms = make_rooms(store.forms)
        self.traffic = Traffic()

    def close(self) -> None:
        """Stop reading."""
        self._store.close()

    def __call__(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Each expert with its weights, which stay where they are until the next one is asked for.

        Weights of plain experts are those in the slot itself: what is written to them stays there until the expert
        leaves.

        Args:
            layer: number of the MoE layer.
            experts: ids, each once.
        """
        slots = self.layers[layer]
        weights = slots if self._rooms[layer] is None else ExpandedWeights(slots, slots.form, self._rooms[layer] or {})
        slots.cache.demand(list(experts))
        for expert in _landing(slots, experts, self.traffic):
            yield expert, dict(weights[expert])

    def held(self, layer: int, expert: int) -> dict[str, torch.Tensor] | None:
        """The weights of a plain expert that is in a slot; None where it is not."""
        slots = self.layers[layer]
        return dict(slots[expert]) if expert in slots else None


def _landing(slots: LayerSlots, experts: Sequence[int], traffic: Traffic) -> Iterator[int]:
    """Experts in the order in which they are there; as many reads are on their way as slots are left for."""
    hits = [expert for expert in experts if expert in slots]
    waiting = [expert for expert in experts if expert not in slots][::-1]
    flying: set[int] = set()
    landed: SimpleQueue[Ticket] = SimpleQueue()
    traffic.hits += len(hits)
    traffic.misses += len(waiting)
    traffic.bytes_read += len(waiting) * slots.expert_bytes

    def read(busy: Sequence[int]) -> None:
        while waiting and len(flying) + len(busy) < slots.num_slots:
            slots.start_read(waiting[-1], [*flying, *busy], landed)
            flying.add(waiting.pop())

    for place, expert in enumerate(hits):
        read(hits[place:])
        yield expert
    while waiting or flying:
        read(())
        ticket = next_landed(landed, f"one of the experts {sorted(flying)[:8]} of MoE layer {slots.layer}")
        flying.discard(ticket.expert)
        read((ticket.expert,))
        yield ticket.expert
