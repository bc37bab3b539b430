"""Visits some experts of a layer, each once: those in slots first, the others as they land from the disk.

All layers share one pool of slots. The order of visits is known, so an expert goes whose own is farthest away, and
reads run ahead of the layer that computes as far as there are slots: the disk does not wait for attention.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from ...ram.expanded import make_rooms
from ...store.reading import Ticket, next_landed
from ...store.store import ExpertStore, Slots
from .records import Key
from .sweeps import Sweeps


@dataclass
class Traffic:
    """What a step moved.

    Args:
        hits, misses: visited experts that stayed in a slot from one visit to the next, and that were read.
        bytes_read, bytes_written: of visited experts, records and activations, from and to the disk or its page cache.
        bytes_in_vain: read of experts that nobody visited.
    """

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_in_vain: int = 0


@dataclass(eq=False)
class _Held:
    """An expert in a slot, or on its way there."""

    slot: int
    weights: dict[str, torch.Tensor]
    """As stored; not to be looked at before the ticket has landed."""
    ticket: Ticket
    has_landed: bool = False
    is_new: bool = True
    """Whether it was read since its last visit."""


class ExpertVisits:
    """The RAM slots of all layers, for callers that need every expert of a layer for a moment.

    Args:
        store: reads experts; closed by `close`.
        num_slots: of the whole pool, at least 1; one holds any expert of any layer.
        sweeps: the order of visits.
    """

    def __init__(self, store: ExpertStore, num_slots: int, sweeps: Sweeps) -> None:
        self._store, self._sweeps = store, sweeps
        self.forms = store.forms
        sizes, guards = ([getattr(form, name) for form in store.forms] for name in ("slot_bytes", "guard_bytes"))
        self._slots = Slots(num_slots, max(sizes), max(guards))
        self._free = list(range(num_slots))
        self._rooms = make_rooms(store.forms)
        self._held: dict[Key, _Held] = {}
        self._landed: SimpleQueue[Ticket] = SimpleQueue()
        self.traffic = Traffic()
        self.waited_s = 0.0
        """Seconds in which nothing was computed for want of an expert."""

    @property
    def is_direct(self) -> bool:
        """Whether experts are read past the page cache."""
        return self._store.is_direct

    @property
    def disk_busy_s(self) -> float:
        """Seconds in which an expert was on its way."""
        return self._store.busy_s

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
        self._sweeps.visit(layer, experts)
        waiting = {(layer, expert): None for expert in experts}
        self._count(waiting)
        busy: Key | None = None
        while waiting:
            self._read_on(waiting, busy)
            busy = self._next_of(waiting)
            del waiting[busy]
            held = self._held[busy]
            held.is_new = False
            yield busy[1], self._computed(layer, held)
        self._read_on(waiting, None)

    def held(self, layer: int, expert: int) -> dict[str, torch.Tensor] | None:
        """The weights of a plain expert that is in a slot; None where it is not."""
        held = self._held.get((layer, expert))
        if held is None:
            return None
        held.ticket.wait()
        return dict(held.weights)

    def _computed(self, layer: int, held: _Held) -> dict[str, torch.Tensor]:
        """An expert as the model computes with it."""
        room = self._rooms[layer]
        if room is None:
            return dict(held.weights)
        self.forms[layer].expand(held.weights, room)
        return dict(room)

    def _count(self, wanted: Collection[Key]) -> None:
        read = [key[0] for key in wanted if key not in self._held or self._held[key].is_new]
        self.traffic.hits += len(wanted) - len(read)
        self.traffic.misses += len(read)
        self.traffic.bytes_read += sum(self.forms[layer].expert_bytes for layer in read)

    def _next_of(self, waiting: Collection[Key]) -> Key:
        """One of those that are waited for, as soon as one is there."""
        self._settle()
        while (found := self._first_landed(waiting)) is None:
            missing = sorted(expert for _, expert in waiting)[:8]
            started = time.perf_counter()
            self._note(next_landed(self._landed, f"one of the experts {missing} of a MoE layer"))
            self.waited_s += time.perf_counter() - started
            self._read_on(waiting, None)
        return found

    def _first_landed(self, waiting: Collection[Key]) -> Key | None:
        return next((key for key in waiting if key in self._held and self._held[key].has_landed), None)

    def _settle(self) -> None:
        """Note everything that has landed."""
        while not self._landed.empty():
            self._note(next_landed(self._landed, "an expert"))

    def _note(self, ticket: Ticket) -> None:
        self._held[ticket.layer, ticket.expert].has_landed = True

    def _read_on(self, waiting: Collection[Key], busy: Key | None) -> None:
        """Start reads: first what this layer waits for, then what comes after it, while there are slots.

        Args:
            waiting: of this layer, not yet visited.
            busy: being computed.
        """
        for key in waiting:
            if key not in self._held and not self._start(key, 0, waiting, busy):
                return
        for visits, key in self._sweeps.ahead():
            if key not in self._held and not self._start(key, visits, waiting, busy):
                return

    def _start(self, key: Key, visits: float, waiting: Collection[Key], busy: Key | None) -> bool:
        """Start reading an expert that is so many visits away, if a slot is free or held for one farther away."""
        if not self._free and not self._evict(visits, waiting, busy):
            return False
        slot, (layer, expert) = self._free.pop(), key
        ticket, shifts = self._store.read(layer, expert, slot, self._slots, self._landed)
        form = self.forms[layer]
        self._held[key] = _Held(slot, form.views(self._slots.slot(slot), shifts), ticket)
        return True

    def _evict(self, visits: float, waiting: Collection[Key], busy: Key | None) -> bool:
        """Free the slot of the expert whose visit is farthest away, if it is farther than `visits`."""
        leaving, farthest = None, visits
        for key, held in self._held.items():
            if held.has_landed and key != busy and key not in waiting:
                away = self._sweeps.visits_until(key)
                if away > farthest:
                    leaving, farthest = key, away
        if leaving is None:
            return False
        gone = self._held.pop(leaving)
        if gone.is_new:
            self.traffic.bytes_in_vain += self.forms[leaving[0]].expert_bytes
        self._free.append(gone.slot)
        return True
