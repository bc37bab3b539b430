"""Codes that run down the inputs (GPTQ, AWQ): what they mean, and the same weights as rows.

A stored matrix here is `[columns, rows]` of the weight. It is turned each time that it is expanded; a packed copy holds
it turned already. Columns that GPTQ sorted by activation have an index of their group, which a packed copy keeps: the
columns stay where they are, so sums have the order of the plain weight.

Source: AutoAWQ's `dequantize_gemm` and GPTQModel's `dequantize_weight`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .bits import pack_bits
from .decode import PRODUCT_DTYPES, SCALE_DTYPES, group_order
from .encoding import ITEM_BYTES, WORD_BYTES, Encoding

WORD_BITS = 8 * WORD_BYTES
"""The same in bits."""
AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where in a word of AWQ the eight neighbouring outputs stand."""


@dataclass(frozen=True, kw_only=True)
class TurnedEncoding:
    """How a weight `[rows, columns]` is stored with its codes down the columns.

    Args:
        form: `"gptq"`, whose words hold inputs, or `"awq"`, whose words hold outputs.
        bits: of a code: 4 or 8.
        group_columns: inputs that share a scale.
        scale: dtype of the scales, F16 or BF16; products are rounded to it.
        zero_offset: what is added to a stored zero, 1 in the older format of GPTQ.
        has_order: whether an index names the group of each column.
        is_sorted: whether the index is more than the order of the columns.
    """

    form: str
    bits: int
    group_columns: int
    scale: str
    zero_offset: int
    has_order: bool
    is_sorted: bool = False

    @property
    def packed(self) -> Encoding:
        """The encoding of the turned weight."""
        return Encoding(
            codes=f"uint{self.bits}",
            group_rows=1,
            group_columns=self.group_columns,
            scale=self.scale,
            product=self.scale,
            zero="bytes",
            has_order=self.is_sorted,
        )

    def part_bytes(self, rows: int, columns: int) -> Mapping[str, int]:
        """Bytes of each part that a matrix has, by role."""
        groups = -(-columns // self.group_columns)
        parts = {
            "codes": rows * columns * self.bits // 8,
            "scales": groups * rows * ITEM_BYTES[self.scale],
            "zeros": groups * rows * self.bits // 8,
        }
        return parts | ({"order": columns * WORD_BYTES} if self.has_order else {})

    def row_offset(self, role: str, row: int, rows: int, columns: int) -> int:
        """Only whole matrices can be read.

        Raises:
            ValueError: if rows are cut off.
        """
        if row:
            raise ValueError("a matrix whose codes run down its columns cannot be cut by rows")
        return 0

    def is_in_order(self, parts: Mapping[str, torch.Tensor], columns: int) -> bool:
        """Whether the columns of a group are neighbours."""
        return not self.has_order or torch.equal(
            self._order(parts, columns), torch.arange(columns) // self.group_columns
        )

    def turn(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> dict[str, torch.Tensor]:
        """The parts of the turned weight: what `packed` describes."""
        code_OI, zero_ON, scale_ON = self._numbers(parts, rows, columns)
        if self.is_sorted:
            self._order(parts, columns)  # refuses what is no group
        packed_OB = pack_bits(code_OI.to(torch.uint8), self.bits, self.packed.row_bytes(columns))
        numbers = {"codes": packed_OB, "scales": scale_ON, "zeros": zero_ON.to(torch.uint8)}
        turned = {role: number.contiguous().view(torch.uint8).reshape(-1) for role, number in numbers.items()}
        return turned | ({"order": parts["order"]} if self.is_sorted else {})

    def decode(self, parts: Mapping[str, torch.Tensor], rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """The weight `[rows, columns]`, whatever the order of its columns."""
        code_OI, zero_ON, scale_ON = self._numbers(parts, rows, columns)
        group_I = self._order(parts, columns) if self.has_order else torch.arange(columns) // self.group_columns
        product = PRODUCT_DTYPES[self.scale]
        return ((code_OI - zero_ON[:, group_I]).to(product) * scale_ON[:, group_I]).to(dtype)

    def _order(self, parts: Mapping[str, torch.Tensor], columns: int) -> torch.Tensor:
        return group_order(parts["order"], -(-columns // self.group_columns))

    def _numbers(
        self, parts: Mapping[str, torch.Tensor], rows: int, columns: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes, zeros and scales by output, int32 and the scales' own dtype."""
        words = parts["codes"].clone().view(torch.int32)
        scale_NO = parts["scales"].clone().view(SCALE_DTYPES[self.scale]).view(-1, rows)
        zero_NO = self._outputs_of(parts["zeros"].clone().view(torch.int32).view(len(scale_NO), -1))
        zero_ON = (zero_NO + self.zero_offset).bitwise_and((1 << self.bits) - 1).t()
        if self.form == "awq":
            return self._outputs_of(words.view(columns, -1)).t(), zero_ON, scale_NO.t()
        code_IO = self._unpack(words.view(-1, rows)).transpose(1, 2).reshape(-1, rows)
        return code_IO[:columns].t(), zero_ON, scale_NO.t()

    def _outputs_of(self, word_NI: torch.Tensor) -> torch.Tensor:
        """Words along the outputs as one code each."""
        code_NIO = self._unpack(word_NI)
        if self.form == "awq":
            code_NIO = code_NIO[..., AWQ_NIBBLES]
        return code_NIO.reshape(len(word_NI), -1)

    def _unpack(self, word_NI: torch.Tensor) -> torch.Tensor:
        shift = torch.arange(0, WORD_BITS, self.bits, dtype=torch.int32)
        return (word_NI[..., None] >> shift) & ((1 << self.bits) - 1)
