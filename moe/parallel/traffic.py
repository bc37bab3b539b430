"""Traffic: rows and bytes that a dispatch moved between processes, counted as they were sent.

Shapes: G processes.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(kw_only=True, eq=False)
class Traffic:
    """What one process sent and computed; counts add up until `clear`.

    Args:
        num_ranks: G, processes of the group.
        rank: this process's place in it.
    """

    num_ranks: int
    rank: int
    row_G: Tensor = field(init=False)
    pair_G: Tensor = field(init=False)
    bytes_G: Tensor = field(init=False)
    computed_rows: int = field(init=False)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.row_G, self.pair_G, self.bytes_G = (torch.zeros(self.num_ranks, dtype=torch.int64) for _ in range(3))
        self.computed_rows = 0

    def note(self, row_G: Tensor, pair_G: Tensor, row_bytes: int, computed_rows: int) -> None:
        """Add one dispatch.

        Args:
            row_G: int64 rows sent to each process, this one included.
            pair_G: int64 (token, expert) pairs that these rows stand for.
            row_bytes: bytes of a row there and back.
            computed_rows: (token, expert) pairs that this process's experts computed.
        """
        self.row_G += row_G.cpu()
        self.pair_G += pair_G.cpu()
        self.bytes_G += row_G.cpu() * row_bytes
        self.computed_rows += computed_rows

    @property
    def remote_rows(self) -> int:
        """Rows that left this process."""
        return int(self.row_G.sum() - self.row_G[self.rank])

    @property
    def remote_bytes(self) -> int:
        """Bytes of rows that left this process, there and back."""
        return int(self.bytes_G.sum() - self.bytes_G[self.rank])

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {
            "rows": self.row_G.tolist(),
            "pairs": self.pair_G.tolist(),
            "bytes": self.bytes_G.tolist(),
            "computed": self.computed_rows,
        }
