"""Rows of a large table in bounded memory: those that were used last, and those that are on their way.

A text uses few rows over and over, and which it uses follows from its token ids. So rows are asked for when a pass
begins, all at once, and are waited for where they are looked up.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from ..store.reading import Ticket
from ..store.store import ExpertStore, Slots


class KeptRows:
    """Rows of one table, each read to where it stays.

    An exception between any two lines can leave a read without its row. The runtime then ends all reads and calls
    `clear` before anything else is asked for.

    Args:
        store: reads rows.
        number: of the table among the store's forms, in which each row is an expert.
        count: rows that are kept, 1 or more.
    """

    def __init__(self, store: ExpertStore, number: int, count: int) -> None:
        form = store.forms[number]
        (parameter,) = form.layer.parameters
        self.count = count
        self._store, self._number = store, number
        self._slots = Slots(count, form.expert_bytes)
        self._row_CD = self._slots.tensor[: count * form.expert_bytes].view(parameter.dtype).view(count, -1)
        self.clear()

    def clear(self) -> None:
        """Forget all rows; none may be on its way."""
        self._place: OrderedDict[int, int] = OrderedDict()
        self._free = list(range(self.count))
        self._on_way: dict[int, Ticket] = {}

    def close(self) -> None:
        """Forget all rows and give their memory back; none may be on its way."""
        self.clear()
        self._slots.give_back()

    def ask(self, row_N: Sequence[int], *, is_demand: bool) -> int:
        """Start to read those of some rows that are not here, in place of the ones that were not used for longest.

        Args:
            row_N: numbers of at most `count` different rows, which stay until others are asked for.
            is_demand: whether they are needed now.

        Returns:
            How many reads began.

        Raises:
            TimeoutError: if a place is not free because its read does not end.
        """
        for row in row_N:
            if row in self._place:
                self._place.move_to_end(row)
        missing = [row for row in row_N if row not in self._place]
        if not missing:
            return 0
        places = [self._take_place() for _ in missing]
        ticket = self._store.read_rows(self._number, missing, places, self._slots, is_demand=is_demand)
        self._place.update(zip(missing, places, strict=True))
        self._on_way.update(dict.fromkeys(missing, ticket))
        return len(missing)

    def take(self, row_N: Sequence[int], wait: Callable[[Ticket], None]) -> torch.Tensor:
        """Copies of rows that were asked for, `[N, D]`.

        Args:
            row_N: their numbers.
            wait: returns when a read has ended well; called for reads that are on their way.
        """
        tickets = {self._on_way.pop(row) for row in row_N if row in self._on_way}
        for ticket in tickets:
            wait(ticket)
        return self._row_CD[[self._place[row] for row in row_N]]

    def _take_place(self) -> int:
        if self._free:
            return self._free.pop()
        row, place = self._place.popitem(last=False)
        # a pass that an exception ended may have asked for it: nothing may be written to a place that another row gets
        if (ticket := self._on_way.pop(row, None)) is not None:
            ticket.wait()
        return place
