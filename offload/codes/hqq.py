"""Codes of HQQ: a weight reshaped to groups, whose codes share bytes with codes of rows far away.

The weight `[rows, columns]` is read as `[groups, group]` (axis 1) or `[group, groups]` (axis 0). Of these lines, the
first share of them stands in the highest bits of the stored items, the next one below, and so on. With axis 1 a group
is a run of a row, and a packed copy holds the same weight as rows; other groups are computed directly.

Source: hqq's `Quantizer.dequantize` and `BitPack` (hqq/core/quantize.py and bitpack.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .bits import pack_bits
from .decode import PRODUCT_DTYPES, SCALE_DTYPES
from .encoding import ITEM_BYTES, Encoding


@dataclass(frozen=True)
class Packing:
    """Codes of `bits` bits, `count` of them in an item of `item_bytes` bytes."""

    bits: int
    count: int
    item_bytes: int


PACKINGS: Mapping[str, Packing] = {
    "8bit_u8": Packing(8, 1, 1),
    "4bit_u8": Packing(4, 2, 1),
    "3bit_32": Packing(3, 10, 4),
    "2bit_u8": Packing(2, 4, 1),
    "1bit_u8": Packing(1, 8, 1),
}
"""By hqq's own names. Only lines of three bits are filled up to whole items. Codes of 5 and 6 bits stand in eight bits,
and ternary ones (1.58 bits) in two."""


@dataclass(frozen=True, kw_only=True)
class HqqEncoding:
    """How a weight `[rows, columns]` is stored.

    Args:
        packing: a key of PACKINGS.
        group: weights that share a scale and a zero.
        axis: 1 if weights of a group are neighbours, 0 if they lie far apart.
        scale: dtype of scales and zeros; differences and products are rounded to it.
    """

    packing: str
    group: int
    axis: int
    scale: str

    form = "hqq"

    @property
    def packed(self) -> Encoding:
        """The encoding of the weight as rows."""
        return Encoding(
            codes=f"uint{PACKINGS[self.packing].bits}",
            group_rows=1,
            group_columns=self.group,
            scale=self.scale,
            product=self.scale,
            zero="floats",
        )

    def lines(self, rows: int, columns: int) -> tuple[int, int]:
        """Number and length of the lines that the weight is reshaped to."""
        groups = rows * columns // self.group
        return (groups, self.group) if self.axis == 1 else (self.group, groups)

    def part_bytes(self, rows: int, columns: int) -> Mapping[str, int]:
        """Bytes of each part that a matrix has, by role."""
        packing, (count, length) = PACKINGS[self.packing], self.lines(rows, columns)
        numbers = rows * columns // self.group * ITEM_BYTES[self.scale]
        codes = -(-count // packing.count) * length * packing.item_bytes
        return {"codes": codes, "scales": numbers, "zeros": numbers}

    def row_offset(self, role: str, row: int, rows: int, columns: int) -> int:
        """Only whole matrices can be read.

        Raises:
            ValueError: if rows are cut off.
        """
        if row:
            raise ValueError("a matrix whose rows share bytes cannot be cut by rows")
        return 0

    def is_in_order(self, parts: Mapping[str, torch.Tensor], columns: int) -> bool:
        """Whether each group is a run of a row."""
        return self.axis == 1 and columns % self.group == 0

    def turn(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> dict[str, torch.Tensor]:
        """The parts of the weight as rows, whose groups are runs of them: what `packed` describes."""
        code_RC = self._codes(parts["codes"], rows, columns).reshape(rows, columns).to(torch.uint8)
        packed_RB = pack_bits(code_RC, PACKINGS[self.packing].bits, self.packed.row_bytes(columns))
        return {"codes": packed_RB.reshape(-1), "scales": parts["scales"], "zeros": parts["zeros"]}

    def decode(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight `[rows, columns]`, whatever its groups are."""
        by_line = (-1, 1) if self.axis == 1 else (1, -1)
        scale, zero = (parts[role].clone().view(SCALE_DTYPES[self.scale]).view(by_line) for role in ("scales", "zeros"))
        code = self._codes(parts["codes"], rows, columns).to(PRODUCT_DTYPES[self.scale])
        return ((code - zero) * scale).to(dtype).reshape(rows, columns)

    def _codes(self, codes: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """Codes of each line, int32."""
        packing, (count, length) = PACKINGS[self.packing], self.lines(rows, columns)
        item = codes if packing.item_bytes == 1 else codes.clone().view(torch.int32)
        shift = packing.bits * torch.arange(packing.count - 1, -1, -1, dtype=torch.int32)
        number = (item.int().view(1, -1, length) >> shift[:, None, None]) & ((1 << packing.bits) - 1)
        return number.reshape(-1, length)[:count]
