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
KEPT_BYTES = 16 << 20
"""Of the rows of a table that were used lately and stay in memory; other sizes were not tried."""
LARGE_TABLE_BYTES = 256 << 20
"""Tables from here on are read by their rows as soon as experts do not all fit: a row is one short read a token, and
so much memory holds many experts. Not measured."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowPlan:
    """What is streamed of a model.

    Args:
        guests: all that could be.
        streamed: layers and the head that are, in order of use; the rest of `guests.passing` stays in memory.
        ahead: guests that are read while one is computed.
        least_table: bytes of a table that is read by its rows, or more; smaller ones stay in memory.
    """

    guests: Guests
    streamed: tuple[Guest, ...]
    ahead: int
    least_table: int = 0

    @property
    def tables(self) -> tuple[Guest, ...]:
        """Tables whose rows are read one by one: all that are large enough, but for one that stays as the head."""
        head, tables = self.guests.head, self.guests.embeddings
        if self.guests.is_tied and head not in self.streamed:
            tables = tables[1:]
        return tuple(table for table in tables if table.nbytes >= self.least_table)

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
        """Memory of the rows of each table that are read or stay."""
        return sum(kept_rows(guest) * guest.form.expert_bytes for guest in self.tables)

    @property
    def nbytes(self) -> int:
        """Memory of the window."""
        return self.ring_bytes + self.row_bytes


def _sum_around(sizes: Sequence[int], first: int, count: int) -> int:
    return sum(sizes[(first + step) % len(sizes)] for step in range(count))


def kept_rows(table: Guest) -> int:
    """Rows of a table that stay in memory: as many as KEPT_BYTES hold, and enough for the reading threads."""
    return min(max(KEPT_BYTES // max(table.form.expert_bytes, 1), ROWS), table.form.layer.num_experts)


def plan_tables(guests: Guests) -> WindowPlan | None:
    """Read the large tables by their rows and keep everything else; None if there are none."""
    plan = WindowPlan(guests=guests, streamed=(), ahead=0, least_table=LARGE_TABLE_BYTES)
    return plan if plan.tables else None


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
