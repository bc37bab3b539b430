"""Further levels of one layer's experts in memory: pools of places, who holds which, who gives way.

An expert holds levels without a gap. A place is free only when nothing writes to it, as a slot is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import torch

from ..cache.depth import Heat
from ..formats.lossy.levelled import LevelledForm
from ..store.reading import Ticket
from ..store.store import ExpertStore, Slots

COLDER = 0.5
"""Share of a hot expert's heat below which another gives way to it while nothing needs it: who is nearly as hot would
take the place back at once. Not tuned."""


@dataclass(eq=False)
class Plane:
    """One level of an expert, beyond the first."""

    place: int
    stored: torch.Tensor
    ticket: Ticket | None
    """Of its reading; None once it is there."""
    is_ahead: bool
    """Whether nothing needed it when its reading began."""


class Planes:
    """Levels of experts beyond the first.

    Args:
        store: where they are read from; its form of the layer is a `LevelledForm`.
        layer: number of the MoE layer.
        counts: places for each level after the first.
        heat: of the layer's experts.
    """

    def __init__(self, store: ExpertStore, layer: int, counts: Sequence[int], heat: Heat) -> None:
        form = store.forms[layer]
        assert isinstance(form, LevelledForm)
        self._store, self._layer, self._heat = store, layer, heat
        self.counts = tuple(counts)
        self._pools = [
            Slots(form.layer.num_experts, form.level_room(level), num_held=count)
            for level, count in enumerate(counts, start=1)
        ]
        self.reset()
        self.clear()

    def reset(self) -> None:
        """Set the counts of what was read ahead to 0."""
        self.num_ahead = self.ahead_bytes = 0

    def clear(self) -> None:
        """Forget all levels; none may be on its way."""
        self._free = [list(range(count))[::-1] for count in self.counts]
        self._held: dict[int, list[Plane]] = {}
        self._given_up: list[tuple[Ticket, int, int]] = []

    def close(self) -> None:
        """Forget all levels and give the memory back."""
        self.clear()
        for pool in self._pools:
            pool.give_back()

    def num_started(self, expert: int) -> int:
        """Levels after the first that are there or on their way."""
        return len(self._held.get(expert, ()))

    def there(self, expert: int) -> list[torch.Tensor]:
        """Levels after the first that are there, up to the first that is not."""
        found = []
        for plane in self._held.get(expert, ()):
            if plane.ticket is not None:
                break
            found.append(plane.stored)
        return found

    def num_there(self, expert: int) -> int:
        """How many `there` has."""
        return len(self.there(expert))

    @property
    def coming(self) -> list[tuple[int, Plane]]:
        """Experts and levels that are on their way."""
        return [
            (expert, plane) for expert, planes in self._held.items() for plane in planes if plane.ticket is not None
        ]

    def start(self, expert: int, kept: Mapping[int, int], landed: "SimpleQueue[Ticket]") -> None:
        """Start reading the next level of an expert, which is needed now.

        Args:
            kept: of experts that a call uses, the levels after the first that must stay.
            landed: where the ticket goes.
        """
        level = self.num_started(expert)
        while (place := self._place(level, expert, kept, limit=None)) is None:
            # what is still being read for later holds the rest
            ticket = next(plane.ticket for other, plane in self.coming if plane.ticket and other not in kept)
            ticket.wait()
            self.settle()
        self._read(expert, level, place, landed, is_demand=True)

    def start_ahead(self, expert: int, kept: Mapping[int, int]) -> bool:
        """Start reading the next level of an expert behind everything that is needed; whether there was room."""
        level = self.num_started(expert)
        place = self._place(level, expert, kept, limit=COLDER * self._heat[expert])
        if place is not None:
            self._read(expert, level, place, SimpleQueue(), is_demand=False)
        return place is not None

    def hurry(self, expert: int, num_levels: int, landed: "SimpleQueue[Ticket]") -> int:
        """Have what is on its way land in a queue, before everything that is not needed.

        Args:
            expert: whose levels.
            num_levels: after the first that are needed.

        Returns:
            How many will land.
        """
        tickets = [plane.ticket for plane in self._held.get(expert, ())[:num_levels] if plane.ticket is not None]
        for ticket in tickets:
            self._store.promote(ticket)
            ticket.redirect(landed)
        return len(tickets)

    def settle(self) -> None:
        """Levels that have been read are there from now on.

        Raises:
            OSError: if reading failed.
        """
        for expert in {expert for expert, _ in self.coming}:
            self.complete(expert, len(self.counts))

    def complete(self, expert: int, num_levels: int) -> None:
        """The same of one expert and its first levels after the first.

        Raises:
            OSError: if reading failed.
        """
        for plane in self._held.get(expert, ())[:num_levels]:
            if plane.ticket is None or not plane.ticket.is_finished:
                continue
            if (error := plane.ticket.error) is not None:
                raise OSError(
                    f"reading a level of expert {expert} of MoE layer {self._layer} failed: {error}"
                ) from error
            plane.ticket = None
            self.num_ahead += plane.is_ahead
            self.ahead_bytes += plane.stored.nbytes * plane.is_ahead

    def drop(self, expert: int, num_kept: int = 0) -> None:
        """Give the places of an expert's levels back, all but the first `num_kept` after the first."""
        planes = self._held.get(expert, [])
        for level, plane in reversed([*enumerate(planes)][num_kept:]):
            if plane.ticket is None or plane.ticket.is_finished:
                self._free[level].append(plane.place)
            else:
                # a thread may be within a job of it, which still writes
                plane.ticket.is_cancelled = True
                self._given_up.append((plane.ticket, level, plane.place))
        del planes[num_kept:]
        if not planes:
            self._held.pop(expert, None)

    def resize(self, counts: Sequence[int]) -> None:
        """Have places for so many planes of each level; the coldest experts lose theirs. Nothing may be on its way."""
        self._reclaim()
        for level, (pool, count) in enumerate(zip(self._pools, counts, strict=True)):
            holders = sorted((e for e, planes in self._held.items() if len(planes) > level), key=self._heat.__getitem__)
            for expert in holders[: max(len(holders) - count, 0)]:
                self.drop(expert, level)
            free = [place for place in range(count) if place not in {p.place for p in self._planes_at(level)}][::-1]
            for plane in self._planes_at(level):
                if plane.place >= count:
                    self._move(pool, plane, free.pop())
            pool.hold(count)
            self._free[level] = free
        self.counts = tuple(counts)

    def wait(self) -> None:
        """Until nothing is on its way."""
        for ticket in [plane.ticket for _, plane in self.coming] + [ticket for ticket, _, _ in self._given_up]:
            if ticket is not None:
                ticket.wait()
        self.settle()

    def _planes_at(self, level: int) -> Iterator[Plane]:
        return (planes[level] for planes in self._held.values() if len(planes) > level)

    def _move(self, pool: Slots, plane: Plane, place: int) -> None:
        shift = plane.stored.storage_offset() - pool.slot(plane.place).storage_offset()
        target = pool.slot(place)[shift : shift + len(plane.stored)]
        target.copy_(plane.stored)
        plane.place, plane.stored = place, target

    def _read(self, expert: int, level: int, place: int, landed: "SimpleQueue[Ticket]", *, is_demand: bool) -> None:
        where = self._pools[level], place
        ticket, stored = self._store.read_level(
            *(self._layer, expert, level + 1, where, landed), is_demand=is_demand, urgency=self._heat[expert]
        )
        self._held.setdefault(expert, []).append(Plane(place, stored, ticket, not is_demand))

    def _place(self, level: int, expert: int, kept: Mapping[int, int], limit: float | None) -> int | None:
        """A place for a level, if need be of the coldest expert that may lose its own.

        Args:
            limit: heat from which on experts keep theirs; None is none.
        """
        self._reclaim()
        if not self._free[level]:
            losers = [
                other
                for other, planes in self._held.items()
                if len(planes) > level
                and other != expert
                and kept.get(other, 0) <= level
                and all(plane.ticket is None for plane in planes[level:])
            ]
            coldest = min(losers, key=self._heat.__getitem__, default=None)
            if coldest is None or (limit is not None and self._heat[coldest] >= limit):
                return None
            self.drop(coldest, level)
        return self._free[level].pop()

    def _reclaim(self) -> None:
        for entry in [entry for entry in self._given_up if entry[0].is_finished]:
            _, level, place = entry
            self._free[level].append(place)
            self._given_up.remove(entry)
