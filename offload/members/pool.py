"""One memory for the weights of several models: who is in it, and who leaves.

A member's weights come layer by layer while it computes its first pass, and stay until another member needs the room.
The last layers of the least popular member leave first: its first ones are then there when it is called again, and the
rest is read behind them.

Source: Composition of Experts (SN40L, arXiv:2405.07518), which switches experts between two memories by copying them
whole; here a switch is a pass whose layers are read ahead.
"""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from ..formats.form import BLOCK_BYTES
from ..store.reading import Ticket
from ..store.store import ExpertStore
from ..window.planning import WindowPlan
from ..window.ring import RingMemory
from ..window.window import Streamed

FORGETTING = 0.9
"""What a request leaves of the popularity that came before it: about ten requests are remembered; not tuned."""
AHEAD_OF_OWN = 2
"""Guests ahead for which a member gives up others of its own, if it is larger than the pool."""
Key = tuple[int, int]
"""Member, and number of the guest."""


@dataclass(eq=False)
class _Place:
    start: int
    count: int
    ticket: Ticket
    views: dict[str, torch.Tensor]


class Pool:
    """Memory of guests of several models.

    Every change is one operation on a dict, so that an exception between any two leaves a whole state. Two are told
    from it later: a read that began without a place (`settle`), and a guest that was given up and has one (`has`).

    Args:
        nbytes: its size; rounded down to blocks.
        num_members: models that share it.
    """

    def __init__(self, nbytes: int, num_members: int) -> None:
        self.num_blocks = nbytes // BLOCK_BYTES
        self.memory = RingMemory(self.num_blocks)
        self.lock, self.turn = threading.RLock(), threading.RLock()
        """Of the bookkeeping, and of a whole pass."""
        self.places: dict[Key, _Place] = {}
        self.in_use: dict[int, int] = {}
        """The guest of each member that is computed now."""
        self.beginning: PooledWindow | None = None
        """Whose read begins now, or has begun when an exception came before its place was noted."""
        self.popularity = [0.0] * num_members

    def note_request(self, member: int) -> None:
        """A request for a member: it is worth keeping."""
        self.popularity = [FORGETTING * each + (number == member) for number, each in enumerate(self.popularity)]

    def bytes_of(self, member: int) -> int:
        """Memory that a member's weights hold now."""
        return sum(place.count for (owner, _), place in list(self.places.items()) if owner == member) * BLOCK_BYTES

    def find(self, count: int, leaving: Iterable[Key]) -> int | None:
        """Where so many blocks are free, after as many have left as had to; None if there is no such place.

        Args:
            count: blocks in one piece.
            leaving: who may leave, in this order.
        """
        start = self._gap(count)
        for key in leaving:
            if start is not None:
                break
            self.drop(key)
            start = self._gap(count)
        return start

    def has(self, key: Key) -> bool:
        """Whether a guest is in memory, or on its way there."""
        return key in self.places and not self.places[key].ticket.is_cancelled

    def settle(self) -> None:
        """Let no read go on that an exception has left without a place: it would write to what others get."""
        if self.beginning is not None:
            self.beginning.give_up()
            self.beginning = None

    def drop(self, key: Key) -> None:
        """Give up a guest, once nothing is written to its memory any more."""
        place = self.places[key]
        place.ticket.is_cancelled = True
        place.ticket.wait()
        del self.places[key]

    def forget(self, member: int) -> None:
        """Forget a member's guests; none may be on its way."""
        for key in [key for key in self.places if key[0] == member]:
            del self.places[key]
        self.in_use.pop(member, None)

    def close(self) -> None:
        """Give the memory back; no member may run afterwards."""
        self.places.clear()
        self.memory.give_back()

    def others(self, member: int) -> Iterator[Key]:
        """Guests of other members, the least popular member's last one first; none that is computed now."""
        keys = [key for key in self.places if key[0] != member and self.in_use.get(key[0]) != key[1]]
        yield from sorted(keys, key=lambda key: (self.popularity[key[0]], key[0], -key[1]))

    def _gap(self, count: int) -> int | None:
        end = 0
        for place in sorted(self.places.values(), key=lambda place: place.start):
            if place.start - end >= count:
                return end
            end = place.start + place.count
        return end if self.num_blocks - end >= count else None


class PooledWindow(Streamed):
    """The part of a pool that belongs to one model.

    Args:
        store, plan, first: as for Streamed; of the plan, all that can be streamed is.
        pool: shared with the other members.
        member: number of this one.
    """

    def __init__(self, store: ExpertStore, plan: WindowPlan, first: int, *, pool: Pool, member: int) -> None:
        super().__init__(store, plan, first)
        self.pool, self.member = pool, member

    def clear(self) -> None:
        """Forget every guest and every row of this member; nothing may be on its way."""
        with self.pool.lock:
            super().clear()
            self.pool.forget(self.member)
            self.turn += 1

    def give_up(self) -> None:
        """Forget every guest of this member once its reads have ended.

        Raises:
            TimeoutError: if one does not end.
        """
        self._store.quiesce()
        self.clear()

    def begin(self) -> None:
        """Start to read what is not there, from the first guest on."""
        with self.pool.lock:
            if self.plan.streamed and self._hold(0, self._leaving(0, 0)):
                self._read_on(0)

    def enter(self, number: int) -> dict[str, torch.Tensor]:
        """A guest's weights, which stay until it is left; waits until they are there.

        Raises:
            OSError: if reading fails.
            MemoryError: if other members that compute now leave no room.
        """
        guest = self.plan.streamed[number]
        with self.pool.lock:
            if self.pool.in_use.pop(self.member, None) is not None:
                self.turn += 1
            self.pool.in_use[self.member] = number
            if not self._hold(number, self._leaving(number, 0)):
                raise MemoryError(f"no room for {guest.name} beside what other members compute with; call them in turn")
            place = self.pool.places[self.member, number]
            self._read_on(number)
        self.counters.entered += 1
        self._wait(place.ticket, guest)
        return place.views

    def leave(self, turn: int) -> None:
        """The guest may leave from now on."""
        super().leave(turn)
        self.pool.in_use.pop(self.member, None)

    def report(self) -> dict[str, Any]:
        """Counts and memory, JSON-serialisable."""
        return super().report() | {
            "resident_layers": sum(owner == self.member for owner, _ in list(self.pool.places)),
            "memory_bytes": self.pool.bytes_of(self.member),
        }

    def _read_on(self, number: int) -> None:
        """Start to read the guests that follow, as far as there is room."""
        count = len(self.plan.streamed)
        for step in range(1, count):
            if not self._hold((number + step) % count, self._leaving(number, step)):
                return

    def _leaving(self, number: int, step: int) -> Iterator[Key]:
        """Who may leave for the guest `step` after this one: other members', then those whose turn comes last."""
        yield from self.pool.others(self.member)
        if step > AHEAD_OF_OWN:
            return
        count = len(self.plan.streamed)
        for back in range(1, count - step):
            key = (self.member, (number - back) % count)
            if key in self.pool.places:
                yield key

    def _hold(self, number: int, leaving: Iterator[Key]) -> bool:
        """Have a guest in memory or on its way there; whether there was room."""
        key = (self.member, number)
        self.pool.settle()
        if self.pool.has(key):
            return True
        if key in self.pool.places:
            self.pool.drop(key)
        form = self.plan.streamed[number].form
        count = form.slot_bytes // BLOCK_BYTES
        if (start := self.pool.find(count, leaving)) is None:
            return False
        layer, memory = self._first + number, self.pool.memory
        self.pool.beginning = self
        ticket, shifts = self._store.read(layer, 0, start, memory, SimpleQueue[Ticket](), is_demand=False)
        views = form.views(memory.slot(start), shifts)
        self.pool.places[key] = _Place(start, count, ticket, views)
        self.pool.beginning = None
        self.counters.bytes_read += form.expert_bytes
        return True
