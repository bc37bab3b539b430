"""The RAM slots of one layer: which expert is in which slot, which is on its way, and which goes when room is short."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache.catalogue import Cache, make_cache
from ..cache.predicted import PredictedUse
from ..compute.layers.routed_experts import ExpertAddresses
from ..compute.routed_rows import can_group
from ..native.kernel_matrix import KernelMatrix
from ..prefetch.predictor import likely_first
from ..store.reading import Ticket
from ..store.store import ExpertStore, Slots
from .counters import AheadCounters

MOST_UNHEARD = 64
"""Tokens whose uses may wait for the policy's next decision."""


@dataclass(eq=False)
class Resident:
    """An expert in a slot."""

    slot: int
    weights: dict[str, torch.Tensor]
    matrices: dict[str, tuple[KernelMatrix, ...]]
    """The same as our C reads them; empty if it does not."""


class LayerSlots:
    """The RAM slots of one layer: which expert is where, and which goes when another needs the room.

    A slot is free only when nothing writes to it. Two lines free slots: `release`, for an expert that has landed, and
    `_reclaim`, for a read that was given up and has ended. Who lets something else read a slot (a copy to a GPU) keeps
    count of that itself and does not release it meanwhile, see `gpu/ram_feed.py`.

    One thread at a time calls these methods (the runtime holds a lock), so there is none here; reading threads see
    tickets only.

    Args:
        store: where experts are read from.
        layer: number of the MoE layer.
        num_slots: experts that fit.
        policy: name in CACHES.
        num_places: slots that there is room for in the address space, of which `num_slots` have memory; all alike.
    """

    holds_several = True

    def __init__(
        self, store: ExpertStore, layer: int, num_slots: int, policy: str, *, num_places: int | None = None
    ) -> None:
        self.layer, self.num_slots = layer, num_slots
        self._store, self.form = store, store.forms[layer]
        self.num_experts = self.form.layer.num_experts
        self.own: Sequence[int] = range(self.num_experts)
        """The experts that this process is asked for."""
        self.expert_bytes = self.form.expert_bytes
        self.is_grouped = can_group(self.form.layer)
        self._has_own_slots = self.has_all and num_places is None
        sizes = self.form.own_slot_bytes if self._has_own_slots else self.form.slot_bytes
        held = None if num_places is None else num_slots
        self._slots = Slots(num_places or num_slots, sizes, self.form.guard_bytes, num_held=held)
        self._policy = policy
        self.ahead_counters = AheadCounters()
        self.addresses = ExpertAddresses(self.num_experts)
        """Of experts that a call can compute with at once: in a slot, and not read ahead for nobody knows what."""
        self.clear()

    def clear(self) -> None:
        """Forget what every slot holds; nothing may be on its way into one."""
        self._free = list(range(self.num_slots))[::-1]
        self._resident: dict[int, Resident] = {}
        self._ahead: dict[int, Ticket] = {}
        self._unproven: set[int] = set()
        self._given_up: list[tuple[Ticket, int]] = []
        self._held: frozenset[int] = frozenset()
        self.addresses.clear()
        self.cache = make_cache(self._policy, self.num_slots, self.num_experts)

    def close(self) -> None:
        """Forget every expert and give the memory back; nothing may be on its way into a slot."""
        self.clear()
        self._slots.give_back()

    @property
    def cache(self) -> Cache:
        """The policy, which has heard of every use."""
        for experts in self._unheard:
            self._cache.demand(experts)
        self._unheard.clear()
        return self._cache

    @cache.setter
    def cache(self, policy: Cache) -> None:
        self._cache, self._unheard = policy, list[list[int]]()

    def use(self, experts: list[int]) -> None:
        """A token uses these experts, each named once; the policy hears of it before it is asked the next time."""
        self._unheard.append(experts)
        if len(self._unheard) >= MOST_UNHEARD:
            _ = self.cache

    def __contains__(self, expert: int) -> bool:
        return expert in self._resident

    def __getitem__(self, expert: int) -> dict[str, torch.Tensor]:
        """An expert's weights, as they are stored."""
        return self._resident[expert].weights

    def matrices(self, expert: int) -> dict[str, tuple[KernelMatrix, ...]]:
        """An expert's weights as our C reads them from where they are stored."""
        return self._resident[expert].matrices

    @property
    def has_all(self) -> bool:
        """Whether there is a slot for every expert, so that none ever has to go."""
        return self.num_slots >= self.num_experts

    def all_of(self, experts: Collection[int]) -> list[dict[str, tuple[KernelMatrix, ...]]] | None:
        """Weights of several experts as our C reads them; None if one is missing, or reads ahead are to be settled."""
        if self._ahead or not self._unproven.isdisjoint(experts):
            return None
        found = [self._resident.get(expert) for expert in experts]
        if None in found:
            return None
        for expert in experts:
            if expert not in self.addresses.known:
                self.complete(expert)
        return [resident.matrices for resident in found if resident is not None]

    @property
    def is_settled(self) -> bool:
        """Whether nothing was begun ahead that the layer's turn would end."""
        return not self._ahead

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def memory(self) -> torch.Tensor:
        """All slots, as bytes."""
        return self._slots.tensor

    def begin(self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """What a call asks for; the experts that it gets, `[T, K]`."""
        return expert_TK

    def end(self) -> None:
        """A call has computed everything."""

    def deepen(self) -> None:
        """What a call needs is on its way: read what makes experts better."""

    def capacity(self, experts: Collection[int]) -> int:
        """How many of the experts of a call can be here at the same time."""
        return self.num_slots

    def holds(self, experts: Collection[int]) -> bool:
        """Whether all experts of a call can be here at the same time."""
        return len(experts) <= self.num_slots

    def is_ready(self, expert: int) -> bool:
        """Whether a call can compute with an expert, unless it is still on its way."""
        return expert in self._resident

    def has_started(self, expert: int) -> bool:
        """Whether all that a call needs of an expert is here or on its way."""
        return expert in self._resident

    def bytes_of(self, experts: Collection[int]) -> int:
        """What `start_reads` would read."""
        return len(experts) * self.expert_bytes

    def complete(self, expert: int) -> None:
        """All that a call waits for of an expert has landed."""
        self.addresses.put(expert, self._resident[expert].matrices)

    def start_reads(
        self, experts: Sequence[int], pinned: Collection[int], landed: "SimpleQueue[Ticket]"
    ) -> dict[int, int]:
        """Start reading what a call lacks of some experts.

        Args:
            experts: in the order in which they are read.
            pinned: experts that must stay.
            landed: where tickets go.

        Returns:
            How many tickets of each expert will land.
        """
        for expert in experts:
            self.start_read(expert, pinned, landed)
        return dict.fromkeys(experts, 1)

    def start_read(self, expert: int, pinned: Collection[int], landed: "SimpleQueue[Ticket]") -> Ticket:
        """Take a slot, evicting if there is no free one, and start reading an expert into it."""
        return self._start(expert, {*pinned, *self._ahead}, landed, is_demand=True)

    def read_ahead(self, expert: int, pinned: Collection[int], most: int) -> bool:
        """Start reading an expert that may be needed soon, behind everything that is needed now.

        Args:
            pinned: experts that must stay.
            most: experts that may be on their way at the same time.

        Returns:
            Whether there was a reason and room to.
        """
        if expert in self._resident or len(self._ahead) >= most:
            return False
        if not self._free and len(self._ahead) + len(pinned) + 1 >= self.num_slots:
            return False
        self._start_ahead(expert, pinned)
        return True

    def expect_use(self, use_E: NDArray[np.floating[Any]], most: int) -> None:
        """A pass begins: start to read what it will probably use, and let the policy `predicted` keep that.

        Args:
            use_E: how likely each expert is, 0..1.
            most: experts that may be on their way at the same time.
        """
        if isinstance(self.cache, PredictedUse):
            self.cache.expect(use_E)
        likely = likely_first(use_E)
        for expert in [expert for expert in likely if expert not in self._resident][:most]:
            self.read_ahead(expert, likely, most)

    def keep_ahead(self, experts: Collection[int]) -> None:
        """Give up reads ahead of experts that are no longer expected; what has arrived stays."""
        for expert in [expert for expert in self._ahead if expert not in experts and expert not in self._held]:
            self._end_ahead(expert)

    def hold(self, experts: Collection[int]) -> None:
        """Keep experts until this is called again, and start reading those that are missing.

        More than there are slots for are not held, so that the cache policy decides as usual.

        Args:
            experts: those that tokens can visit until the next call.
        """
        self._held = frozenset(experts) if len(experts) <= self.num_slots else frozenset()
        # what is on its way and no longer held must not keep the room of what is
        for expert in [expert for expert in self._ahead if self._held and expert not in self._held]:
            self._end_ahead(expert)
        for expert in sorted(self._held - self._resident.keys()):
            self._start_ahead(expert, self._held)

    def take_early(self, expert: int) -> dict[str, torch.Tensor] | None:
        """The weights of an expert before the layer's turn, for a copy that will be used; None if it is not there."""
        ticket = self._ahead.get(expert)
        if expert not in self._resident or not (ticket is None or ticket.is_complete):
            return None
        if ticket is not None:
            self._end_ahead(expert)
        if expert in self._unproven:
            self._unproven.discard(expert)
            self.ahead_counters.useful += 1
        return self._resident[expert].weights

    def settle_ahead(self, needed: Collection[int], landed: "SimpleQueue[Ticket]") -> dict[int, int]:
        """When the layer's turn has come: keep what has arrived, hurry what is needed, give up what is not held.

        Returns:
            Experts that are needed and still on their way, and how many of their tickets will land in `landed`.
        """
        coming: dict[int, int] = {}
        for expert, ticket in list(self._ahead.items()):
            # it may finish between these lines; `redirect` then puts it into `landed` itself
            if expert in needed and not ticket.is_finished:
                self._store.promote(ticket)
                ticket.redirect(landed)
                coming[expert] = 1
                self.ahead_counters.late += 1
                self._unproven.discard(expert)
                self.ahead_counters.bytes_read += self.expert_bytes
                del self._ahead[expert]
            elif expert not in self._held or ticket.is_finished:
                self._end_ahead(expert)
        for expert in self._unproven & set(needed):
            self.ahead_counters.useful += 1
            self._unproven.discard(expert)
        return coming

    def _start_ahead(self, expert: int, pinned: Collection[int]) -> None:
        self._ahead[expert] = self._start(expert, {*pinned, *self._ahead}, SimpleQueue(), is_demand=False)
        self._unproven.add(expert)
        self.ahead_counters.issued += 1

    def _end_ahead(self, expert: int) -> None:
        """Keep an expert that has arrived; give up one that has not."""
        ticket = self._ahead.pop(expert)
        if ticket.is_complete:
            self.ahead_counters.bytes_read += self.expert_bytes
        else:
            self._give_up(expert, ticket)

    def _start(self, expert: int, pinned: Collection[int], landed: "SimpleQueue[Ticket]", *, is_demand: bool) -> Ticket:
        # The views are of memory that is still being written. Nobody computes with them before the ticket has landed.
        slot = self._take_slot(expert, pinned)
        ticket, shifts = self._store.read(self.layer, expert, slot, self._slots, landed, is_demand=is_demand)
        views = self.form.views(self._slots.slot(slot), shifts)
        self._resident[expert] = Resident(slot, views, self.form.kernel_matrices(views, expert))
        self.cache.insert(expert)
        return ticket

    def _take_slot(self, expert: int, pinned: Collection[int]) -> int:
        """A free slot: an expert's own where all have one, since those differ in size."""
        self._reclaim()
        if self._has_own_slots:
            return self._take_own_slot(expert)
        # nothing may be evicted, but reads that were given up are about to end: wait for one instead of failing
        if not self._free and self._given_up and self._resident.keys() <= set(pinned):
            self._given_up[0][0].wait()
            self._reclaim()
        if not self._free:
            kept = {*pinned, *self._held}
            self.release(self.cache.evict(pinned if self._resident.keys() <= kept else kept))
        return self._free.pop()

    def _take_own_slot(self, expert: int) -> int:
        while expert not in self._free:
            # a read of this very expert that was given up still writes there
            next(ticket for ticket, slot in self._given_up if slot == expert).wait()
            self._reclaim()
        self._free.remove(expert)
        return expert

    def _give_up(self, expert: int, ticket: Ticket) -> None:
        """Forget an expert that is still being read; its slot is free again when the last read has ended."""
        # a thread may be within a job of it, which still writes: the slot must not be free before that job has ended
        ticket.is_cancelled = True
        self._given_up.append((ticket, self._forget(expert)))

    def _reclaim(self) -> None:
        for ticket, slot in [pair for pair in self._given_up if pair[0].is_finished]:
            # safe: a finished ticket has no job left, run or skipped
            self._free.append(slot)
            self._given_up.remove((ticket, slot))
            self.ahead_counters.bytes_read += int(self.expert_bytes * ticket.share_read)

    def release(self, expert: int) -> None:
        """Give an expert's slot back; it must not be in use or being read."""
        self._free.append(self._forget(expert))

    def _forget(self, expert: int) -> int:
        slot = self._resident.pop(expert).slot
        self.addresses.remove(expert)
        self.cache.discard(expert)
        if expert in self._unproven:
            self._unproven.discard(expert)
            self.ahead_counters.wasted += 1
        return slot


class KernelSlots:
    """The experts in a layer's slots by id, as our C reads them.

    Args:
        slots: the layer's slots.
    """

    holds_several = True

    def __init__(self, slots: LayerSlots) -> None:
        self._slots = slots

    def __getitem__(self, expert: int) -> dict[str, tuple[KernelMatrix, ...]]:
        return self._slots.matrices(expert)
