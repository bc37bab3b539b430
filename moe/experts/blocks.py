"""Rows sorted by expert, cut into blocks of one expert each, padded so that few sizes of block occur.

Shapes: N routed rows, P places of rows (padding included), M places of one block.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """Some rows of one expert.

    Args:
        expert: id of the expert whose rows these are.
        rows: where they are among the N sorted rows.
        places: where they are among the P places; places beyond the rows are padding.
    """

    expert: int
    rows: slice
    places: slice

    @property
    def num_rows(self) -> int:
        """Rows of the expert, padding not counted."""
        return self.rows.stop - self.rows.start

    @property
    def num_places(self) -> int:
        """M."""
        return self.places.stop - self.places.start


def blocks_of(ends: Sequence[int], most_rows: int, together: int) -> list[Block]:
    """Cut every expert's rows into blocks of about equal size.

    Args:
        ends: the row after each expert's last one.
        most_rows: of a block; a multiple of `together`.
        together: the number of places of a block is a multiple of this.

    Returns:
        The blocks in order; rows and places follow each other without gaps.
    """
    blocks, row, place = [], 0, 0
    for expert, end in enumerate(ends):
        units = -(-(end - row) // together)
        parts = -(-units * together // most_rows)
        for part in range(parts):
            size = (units * (part + 1) // parts - units * part // parts) * together
            rows = slice(row, min(row + size, end))
            blocks.append(Block(expert, rows, slice(place, place + size)))
            row, place = rows.stop, place + size
    return blocks
