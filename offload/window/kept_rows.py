"""Rows of a large table that were read lately, in bounded memory: a text uses few of its rows over and over."""

from collections import OrderedDict

import torch


class KeptRows:
    """The rows of one table that were used last.

    Args:
        count: rows that are kept, 1 or more.
        shape: of a row.
        dtype: of its numbers.
    """

    def __init__(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._row_ND = torch.empty(count, *shape, dtype=dtype)
        self.clear()

    def clear(self) -> None:
        """Forget all rows."""
        self._place: OrderedDict[int, int] = OrderedDict()
        self._num_taken = 0

    def take(self, row: int) -> torch.Tensor | None:
        """A row, which counts as used now; None if it is not kept."""
        if row not in self._place:
            return None
        self._place.move_to_end(row)
        return self._row_ND[self._place[row]]

    def put(self, row: int, values: torch.Tensor) -> None:
        """Keep a row, in place of the one that was not used for longest.

        An exception between any two lines may lose a place, but never gives one to two rows.
        """
        if row in self._place:
            return
        if self._num_taken == len(self._row_ND):
            if not self._place:
                return
            _, place = self._place.popitem(last=False)
        else:
            place = self._num_taken
            self._num_taken += 1
        self._row_ND[place] = values
        self._place[row] = place
