"""Which weights stay and which are streamed, and how far ahead they are read. Without a model.

The floor of a pass is the larger of what it computes and what it reads: streamed bytes over the rate of the disk. Reads
go in order of use and each memory is used again as soon as it is free, so one guest ahead keeps a busy disk busy.

Source: Superpipeline (arXiv:2410.08791), whose two knobs are the layers in fast memory and those that are moved ahead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .guests import ROWS, Guest, Guests

MOST_AHEAD = 2
"""Guests ahead, if nobody says. The second one is a reserve for reads of uneven length; not measured."""
RESERVE_SHARE = 0.1
"""What the second guest ahead may cost: so much more to stream, as a share. Other values were not tried."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowPlan:
    """What is streamed of a model.

    Args:
        guests: all that could be.
        streamed: layers and the head that are, in order of use; the rest of `guests.passing` stays in memory.
        ahead: guests that are read while one is computed.
    """

    guests: Guests
    streamed: tuple[Guest, ...]
    ahead: int

    @property
    def tables(self) -> tuple[Guest, ...]:
        """Embeddings whose rows are read one by one: all, but for one that stays as the head."""
        head = self.guests.head
        if self.guests.is_tied and head not in self.streamed:
            return self.guests.embeddings[1:]
        return self.guests.embeddings

    @property
    def names(self) -> frozenset[str]:
        """Full names of the parameters that are not in memory."""
        return frozenset(name for guest in (*self.tables, *self.streamed) for name in guest.aliases)

    @property
    def num_resident(self) -> int:
        """Layers that stay, the head counting as one."""
        return len(self.guests.passing) - len(self.streamed)

    @property
    def saved_bytes(self) -> int:
        """Bytes of weights that are not in memory."""
        tables = self.tables[1:] if self.guests.is_tied and self.guests.head in self.streamed else self.tables
        return sum(guest.nbytes for guest in (*tables, *self.streamed))

    @property
    def pass_bytes(self) -> int:
        """Bytes that a pass reads, but for rows of embeddings."""
        return sum(guest.nbytes for guest in self.streamed)

    @property
    def ring_bytes(self) -> int:
        """Memory of the guests that are computed or on their way: of each so many in a row, the most."""
        sizes = [guest.form.slot_bytes for guest in self.streamed]
        count = min(self.ahead + 1, len(sizes))
        return max((_sum_around(sizes, first, count) for first in range(len(sizes))), default=0)

    @property
    def row_bytes(self) -> int:
        """Memory into which rows of an embedding are read, of each table."""
        return sum(ROWS * guest.form.slot_bytes for guest in self.tables)

    @property
    def nbytes(self) -> int:
        """Memory of the window."""
        return self.ring_bytes + self.row_bytes


def _sum_around(sizes: Sequence[int], first: int, count: int) -> int:
    return sum(sizes[(first + step) % len(sizes)] for step in range(count))


def plan_window(
    guests: Guests, room_bytes: int, num_resident: int | None = None, ahead: int | None = None
) -> WindowPlan | None:
    """Keep as much as fits, and stream the rest.

    The head stays first, because it is larger than a layer and would need a larger window. The layers that stay are
    spread evenly among those that are streamed, so that the disk has something to do while they are computed.

    Args:
        guests: what can be streamed.
        room_bytes: memory for them and the window.
        num_resident: layers that stay, the head counting as one; None chooses.
        ahead: guests read ahead; None chooses.

    Returns:
        The plan, or None where nothing has to be streamed. The smallest one, where even that does not fit.
    """
    if not guests.nbytes or (num_resident is None and guests.nbytes <= room_bytes):
        return None
    if num_resident is not None and num_resident >= len(guests.passing):
        return None
    if ahead is not None:
        return _most_resident(guests, room_bytes, num_resident, ahead) or smallest_window(guests, num_resident, ahead)
    plans = [_most_resident(guests, room_bytes, num_resident, count) for count in range(MOST_AHEAD + 1)]
    without, single, double = plans
    if single is not None and double is not None:
        is_cheap = double.pass_bytes <= (1 + RESERVE_SHARE) * single.pass_bytes
        return double if is_cheap else single
    return single or without or smallest_window(guests, num_resident)


def smallest_window(guests: Guests, num_resident: int | None = None, ahead: int | None = None) -> WindowPlan:
    """The plan that takes the least memory, where nothing is said."""
    return WindowPlan(guests=guests, streamed=_streamed(guests, num_resident or 0), ahead=ahead or 0)


def _most_resident(guests: Guests, room_bytes: int, num_resident: int | None, ahead: int) -> WindowPlan | None:
    """The plan with most bytes in memory that fits; None if none does."""
    most = len(guests.passing)
    for count in range(most, -1, -1) if num_resident is None else (num_resident,):
        plan = WindowPlan(guests=guests, streamed=_streamed(guests, count), ahead=ahead)
        if guests.nbytes - plan.saved_bytes + plan.nbytes <= room_bytes:
            return plan
    return None


def _streamed(guests: Guests, num_resident: int) -> tuple[Guest, ...]:
    """What is streamed if so many stay, the head first."""
    keeps_head = guests.head is not None and num_resident > 0
    count = len(guests.layers) - (num_resident - keeps_head)
    layers = spread(guests.layers, count)
    return layers if guests.head is None or keeps_head else (*layers, guests.head)


def spread(layers: Sequence[Guest], count: int) -> tuple[Guest, ...]:
    """So many of them, as evenly as possible, the last one among them."""
    total = len(layers)
    return tuple(
        layer for number, layer in enumerate(layers) if (number + 1) * count // total > number * count // total
    )
