"""One description of the stored forms of quantised matrices.

A matrix `[rows, columns]` is stored as codes, a scale for each group of weights, and perhaps zeros and one scale of the
scales. Each weight is `(value of its code - zero) * scale`. Formats differ in the fields of `Encoding` only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "E4M3": 1, "E8M0": 1, "EXP2": 1, "LDEXP": 1}
"""Bytes of a scale. Three kinds are exponents e of 2**(e - 127); they differ in 255, which is NaN as E8M0, infinity as
EXP2, and the exact 2**128 before the product as LDEXP."""
EXPONENT_SCALES = ("E8M0", "EXP2", "LDEXP")
CODE_BITS = {
    "e2m1": 4,
    "offset2": 2,
    "offset3": 3,
    "uint1": 1,
    "uint2": 2,
    "uint3": 3,
    "offset4": 4,
    "uint4": 4,
    "nf4": 4,
    "e4m3": 8,
    "int8": 8,
    "offset8": 8,
    "uint8": 8,
}
"""Kinds of codes: floats of 4 and 8 bits, integers as they are (int8, uint1 to uint8) or stored plus half of their
range (offset2 to offset8), and the sixteen quantiles of QLoRA (nf4). Codes of 3 bits cross the borders of bytes."""
ROLES = ("codes", "scales", "zeros", "global")
"""Parts that our C knows; `order`, the group of each column, is another one."""
WORD_BYTES = 4
"""Of the int32 numbers that compressed-tensors, GPTQ and AWQ pack codes into."""
ORDER_BYTES = 4
"""Of a column's group."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How a matrix is stored.

    Args:
        codes: kind of codes, in CODE_BITS.
        group_rows: rows that share a scale; 0 is all rows.
        group_columns: columns that share a scale; 0 is all columns.
        scale: dtype of the scales, in ITEM_BYTES.
        product: dtype to which code times scale is rounded before it is rounded to the model's dtype; F64 is exact, and
            F127 is float32, of which a 127th is then taken in float32.
        zero: `"none"`; `"packed"`, as codes that run down the columns in words of 32 bits; `"bytes"`, a code for each
            scale; or `"floats"`, a number for each scale, of its dtype and in the units of the codes' values, after
            which the difference is rounded as the product is.
        scale_of_scales: `"none"`, or whether one float32 number `"multiplies"` or `"divides"` all scales.
        is_high_first: whether the high half of a byte is the earlier column.
        is_word_aligned: whether the codes of a row fill whole words of 32 bits.
        has_order: whether an index (int32) names the group of each column; without one, groups are neighbours.
    """

    codes: str
    group_rows: int
    group_columns: int
    scale: str
    product: str = "F32"
    zero: str = "none"
    scale_of_scales: str = "none"
    is_high_first: bool = False
    is_word_aligned: bool = False
    has_order: bool = False

    @property
    def bits(self) -> int:
        """Of a code."""
        return CODE_BITS[self.codes]

    @property
    def form(self) -> str:
        """Name of the stored form, a key of FORMS."""
        if self.codes == "e2m1":
            return "mxfp4" if self.scale in EXPONENT_SCALES else "nvfp4"
        if self.codes == "e4m3":
            is_small = (self.group_rows, self.group_columns) == (1, 32)
            return "mxfp8" if is_small and self.scale in EXPONENT_SCALES else "fp8"
        return "nf4" if self.codes == "nf4" else f"int{self.bits}"

    @property
    def packed(self) -> "Encoding":
        """How a packed copy stores such matrices: as they are."""
        return self

    @cached_property
    def kernel_roles(self) -> tuple[str, ...]:
        """ROLES, empty for the parts that such matrices do not have."""
        has_zeros, has_global = self.zero != "none", self.scale_of_scales != "none"
        return tuple(
            role if is_there else "" for role, is_there in zip(ROLES, (True, True, has_zeros, has_global), strict=True)
        )

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """How many scales a matrix has, down and across."""
        return -(-rows // (self.group_rows or max(rows, 1))), -(-columns // (self.group_columns or max(columns, 1)))

    def row_bytes(self, columns: int) -> int:
        """Bytes of the codes of one row."""
        unit = WORD_BYTES if self.is_word_aligned else 1
        return -(-columns * self.bits // (8 * unit)) * unit

    def part_bytes(self, rows: int, columns: int) -> Mapping[str, int]:
        """Bytes of each part that a matrix has, by role, those of ROLES in their order."""
        down, across = self.grid(rows, columns)
        parts = {"codes": rows * self.row_bytes(columns), "scales": down * across * ITEM_BYTES[self.scale]}
        if self.zero == "packed":
            parts["zeros"] = -(-down * self.bits // (8 * WORD_BYTES)) * WORD_BYTES * across
        elif self.zero != "none":
            parts["zeros"] = down * across * (ITEM_BYTES[self.scale] if self.zero == "floats" else 1)
        if self.scale_of_scales != "none":
            parts["global"] = ITEM_BYTES["F32"]
        if self.has_order:
            parts["order"] = columns * ORDER_BYTES
        return parts

    def row_offset(self, role: str, row: int, rows: int, columns: int) -> int:
        """Where the part of the rows from `row` on begins, in bytes from the beginning of the whole matrix's part.

        Raises:
            ValueError: if a group would be cut.
        """
        if row == 0 or role in ("global", "order") or (role == "scales" and self.group_rows == 0):
            return 0
        if role == "codes":
            return row * self.row_bytes(columns)
        unit = self.group_rows or rows
        if row % unit or (role == "zeros" and self.zero == "packed"):
            raise ValueError(f"row {row} lies inside a group of {unit} rows")
        return self.part_bytes(row, columns)[role]
