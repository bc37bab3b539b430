"""nf4 whose scales are quantised themselves (bitsandbytes' double quantisation), and the same with plain scales.

The scale of group k is `table[code of k] * scale of k's block + offset`, in float32.

Source: QLoRA (arXiv:2305.14314), section 3; bitsandbytes' `dequantize_4bit`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .decode import decode
from .encoding import ITEM_BYTES, Encoding

TABLE_CODES = 256
"""Values that a byte can name."""


@dataclass(frozen=True, kw_only=True)
class NestedEncoding:
    """How such a matrix is stored.

    Args:
        group_columns: columns that share a scale; groups do not cross rows.
        block_groups: scales that share a scale of their own.
        offset: what is added to every scale.
        product: dtype to which code times scale is rounded before the model's dtype.
    """

    group_columns: int
    block_groups: int
    offset: float
    product: str

    form = "nf4"

    @property
    def packed(self) -> Encoding:
        """The encoding with plain scales."""
        return Encoding(
            codes="nf4",
            group_rows=1,
            group_columns=self.group_columns,
            scale="F32",
            product=self.product,
            is_high_first=True,
        )

    def part_bytes(self, rows: int, columns: int) -> Mapping[str, int]:
        """Bytes of each part that a matrix has, by role."""
        groups = rows * columns // self.group_columns
        item = ITEM_BYTES["F32"]
        blocks = -(-groups // self.block_groups)
        return {"codes": rows * columns // 2, "scales": groups, "nested": blocks * item, "table": TABLE_CODES * item}

    def row_offset(self, role: str, row: int, rows: int, columns: int) -> int:
        """Only whole matrices can be read.

        Raises:
            ValueError: if rows are cut off.
        """
        if row:
            raise ValueError("a matrix whose scales are quantised cannot be cut by rows")
        return 0

    def is_in_order(self, parts: Mapping[str, torch.Tensor], columns: int) -> bool:
        """Columns of a group are neighbours."""
        return True

    def decode(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight `[rows, columns]`."""
        return decode(self.packed, self.turn(parts, rows, columns), rows, columns, dtype)

    def turn(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> dict[str, torch.Tensor]:
        """The parts with plain scales: what `packed` describes."""
        table, nested = (parts[role].clone().view(torch.float32) for role in ("table", "nested"))
        block = torch.arange(len(parts["scales"])) // self.block_groups
        scale = table[parts["scales"].int()] * nested[block] + self.offset
        return {"codes": parts["codes"], "scales": scale.view(torch.uint8)}
