"""Orders of summation: how our C adds the terms of a product, each the same whatever else is computed.

    amx           tiles of 32 columns, from left to right, for several rows of x a fresh sum every `block` columns: the
                  order of oneDNN where there is AMX
    avx512_bf16   pairs of columns from left to right, a fresh sum every `block` columns: that of oneDNN without AMX
    avx512, avx2, neon, c
                  16 sums, column c in sum c % 16: our own, for every other processor
    integers      x in fixed point, sums of integers: our own, for codes of few bits where bits are free

Shapes: n rows of x, D model width, F hidden width.
"""

import ctypes
import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..native.kernel_matrix import KernelMatrix
from ..native.library import NUMBER, POINTER, c_function, library

AMX_BLOCK = 32
"""Rows and columns that AMX takes at a time: two tiles of 16 rows, a tile row holds 32 bfloat16 numbers."""
ONE_ROW_BLOCK = 512
"""Columns after which oneDNN begins a fresh sum for one row of x; our own sums do as it does."""
BLOCKS = (ONE_ROW_BLOCK, 1024, 0, 256, 384, 768, 2048)
"""What is tried where oneDNN's blocks are not known; 1,024 is what it takes for several rows. All are multiples of the
64 columns that our C adds before it may begin afresh; 0 is one block for all."""
AMX_INTEGER_ROWS, MOST_INTEGER_ROWS = 2, 16
"""Rows of x that are multiplied in integers with AMX, and without. Each row takes its time anew, while the tiles of AMX
take 16 rows in the time of one. Without it these are all rows that are multiplied by our C at all."""
MOST_PACKED = 1 << 15
"""Matrices whose addresses are kept as C takes them: three for each expert of 80 layers of 128. To convert them anew
for each product would take longer than a small product."""

Shape = tuple[int, int]


class Matrices(ctypes.Structure):
    """`struct matrices` of products.c: matrices of one form and shape, and which of their rows are meant."""

    _fields_ = (
        ("form", ctypes.c_int),
        ("part", ctypes.c_void_p),
        ("parameter", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("count", ctypes.c_int64),
    )


class GatingTables(ctypes.Structure):
    """`struct gating` of products.c."""

    _fields_ = (
        ("gate", ctypes.c_void_p),
        ("linear", ctypes.c_void_p),
        ("is_gated", ctypes.c_int),
        ("is_interleaved", ctypes.c_int),
    )


class ExpertWeights(ctypes.Structure):
    """`struct expert_weights` of products.c: the matrices of several experts, and their biases."""

    _fields_ = (
        ("gate", Matrices),
        ("linear", Matrices),
        ("down", Matrices),
        ("up_bias", ctypes.c_void_p),
        ("down_bias", ctypes.c_void_p),
    )


SUMMING_ROWS = ("amx", "avx512_bf16")
"""Orders that also have products which sum over the rows of a matrix."""


@dataclass(frozen=True)
class Order:
    """One order of summation.

    Args:
        name: as above.
        number: its place in `enum order` of products.c.
        alignment: what rows and columns of a matrix have to be multiples of.
        block: columns of a block, for those that have blocks.
    """

    name: str
    number: int
    alignment: int = 1
    block: int = 0

    def fits(self, shape: Shape) -> bool:
        """Whether a matrix of this shape can be multiplied so."""
        return shape[0] % self.alignment == shape[1] % self.alignment == 0

    def multiply(
        self,
        x: torch.Tensor,
        matrices: Sequence[KernelMatrix],
        outs: Sequence[torch.Tensor],
        *,
        biases: Sequence[torch.Tensor | None] = (),
        is_row_each: bool = False,
    ) -> None:
        """`outs[m] = x @ matrices[m].t() + biases[m]`, rounded once.

        Args:
            x: bfloat16 `[n, D]`, contiguous.
            matrices: of one form and one width; their rows may differ.
            outs: bfloat16 `[n, F]` for each matrix, contiguous; written.
            biases: bfloat16 `[F]` for each matrix, or None; none at all by default.
            is_row_each: matrix m is multiplied with row m of x alone, and `outs[m]` is one row.
        """
        first = matrices[0]
        columns, num = first.columns, len(matrices)
        rows = (ctypes.c_int64 * num)(*[matrix.rows for matrix in matrices])
        parts = part_addresses(matrices)
        bias = pointers([0 if bias is None else bias.data_ptr() for bias in biases]) if any_given(biases) else None
        x_rows, step = (1, columns) if is_row_each else (x.numel() // columns, 0)
        _multiply()(
            *(self.number, self.block, first.form, parts, first.parameter, num),
            *(bias, x.data_ptr(), x_rows, step, addresses(outs), rows, columns),
        )

    def multiply_turned(self, x_nF: torch.Tensor, weight_FD: torch.Tensor, out_nD: torch.Tensor) -> None:
        """`out = x @ weight`: sums go down the rows of a bfloat16 matrix, which is read as it lies.

        Args:
            x_nF, weight_FD: bfloat16, contiguous.
            out_nD: likewise; written.

        Raises:
            ValueError: if this order has no such product; those with tiles or pairs have.
        """
        count, (rows, columns) = x_nF.numel() // weight_FD.shape[0], weight_FD.shape
        given = (x_nF.data_ptr(), count, weight_FD.data_ptr(), rows, columns, out_nD.data_ptr())
        if not _multiply_turned()(self.number, *given):
            raise ValueError(f"the order {self.name} does not sum over rows; amx and avx512_bf16 do")


def any_given(biases: Sequence[torch.Tensor | None]) -> bool:
    """Whether any matrix has a bias."""
    return any(bias is not None for bias in biases)


@functools.cache
def orders() -> tuple[Order, ...]:
    """What this processor has, best first.

    Raises:
        OSError: if there is no C compiler, or it fails.
    """
    found = library()
    found.expertier_lanes.restype = ctypes.c_char_p
    amx = (Order("amx", 0, alignment=AMX_BLOCK),) if found.expertier_has_amx() else ()
    pairs = (Order("avx512_bf16", 1, block=ONE_ROW_BLOCK),) if found.expertier_has_pairs() else ()
    return (*amx, *pairs, Order(found.expertier_lanes().decode(), 2))


@functools.cache
def integers_order() -> Order:
    """The order whose bits are free: it is no torch's, and has its own for matrices that `has_integers` knows.

    Raises:
        OSError: if there is no C compiler, or it fails.
    """
    library()
    return Order("integers", 3)


def has_integers(matrix: KernelMatrix) -> bool:
    """Whether a matrix can be multiplied by `integers_order`: codes of two and three bits, with planes or without."""
    return bool(library().expertier_has_integers(matrix.form, matrix.parameter, ctypes.c_int64(matrix.columns)))


@functools.cache
def most_integer_rows() -> int:
    """Rows of x up to which `integers_order` is quickest; 0 if it has no instructions of its own here."""
    if not library().expertier_has_quick_integers():
        return 0
    return AMX_INTEGER_ROWS if library().expertier_has_amx() else MOST_INTEGER_ROWS


@functools.cache
def _multiply() -> Any:
    matrices = (ctypes.c_int, NUMBER, ctypes.c_int, POINTER, POINTER, NUMBER)
    return c_function("expertier_multiply", *matrices, POINTER, POINTER, NUMBER, NUMBER, POINTER, POINTER, NUMBER)


@functools.cache
def _multiply_turned() -> Any:
    types = (ctypes.c_int, POINTER, NUMBER, POINTER, NUMBER, NUMBER, POINTER)
    return c_function("expertier_multiply_turned", *types, result=ctypes.c_int)


@functools.cache
def experts_function() -> Any:
    """`expertier_experts` of products.c."""
    experts = (ctypes.POINTER(ExpertWeights), ctypes.POINTER(GatingTables), NUMBER)
    return c_function("expertier_experts", ctypes.c_int, NUMBER, NUMBER, *experts, *([POINTER] * 5))


def pointers(numbers: Sequence[int]) -> Any:
    """Addresses as C takes them."""
    return (ctypes.c_void_p * len(numbers))(*numbers)


def part_addresses(matrices: Sequence[KernelMatrix]) -> Any:
    """All addresses of several matrices, one matrix after the other, as C takes them."""
    joined = b"".join([_packed(matrix.parts) for matrix in matrices])
    return (ctypes.c_char * len(joined)).from_buffer_copy(joined)


@functools.lru_cache(maxsize=MOST_PACKED)
def _packed(parts: tuple[int, ...]) -> bytes:
    return struct.pack(f"{len(parts)}P", *parts)


def addresses(tensors: Sequence[torch.Tensor]) -> Any:
    """Where tensors lie, as C takes it."""
    return pointers([tensor.data_ptr() for tensor in tensors])
