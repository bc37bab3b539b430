"""Stored matrices in C: the struct that kernels read, and the expansion of a whole matrix."""

import ctypes
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from ..native.kernel_matrix import PARTS, KernelMatrix
from ..native.library import NUMBER, POINTER, c_function
from .encoding import ITEM_BYTES, Encoding

NIBBLES, BYTES, FEW_BITS = 2, 3, 5
"""Numbers of stored forms in C; `stored_matrix.h` has the same ones, and the orders of the names below."""
CODE_KINDS = ("e2m1", "offset4", "uint4", "nf4", "e4m3", "int8", "offset8", "uint8", "offset2", "offset3")
SCALE_KINDS = ("F32", "BF16", "F16", "E4M3", "E8M0", "EXP2", "LDEXP")
PRODUCT_KINDS = ("F32", "BF16", "F16", "F64", "F127")
ZERO_KINDS = ("none", "packed", "bytes", "floats")
GLOBAL_KINDS = ("none", "multiplies", "divides")
ALL_ROWS = 1 << 30
"""More rows than any matrix has: what stands for all of them."""

Parts = ctypes.c_void_p * PARTS
Parameters = ctypes.c_int32 * 4


def kernel_number(encoding: Encoding) -> int:
    """Number by which the C knows matrices of an encoding."""
    return {4: NIBBLES, 8: BYTES}.get(encoding.bits, FEW_BITS)


@cache
def kernel_parameters(encoding: Encoding, columns: int, *, is_sum: bool = False) -> "ctypes.Array[ctypes.c_int32]":
    """Group rows, group columns, kind of codes and everything else: `parameter` of `struct stored_matrix`.

    Matrices of one width share it, so that one call multiplies several, whatever their rows.

    Args:
        is_sum: whether planes may be added to the codes.
    """
    details = (
        SCALE_KINDS.index(encoding.scale)
        | PRODUCT_KINDS.index(encoding.product) << 4
        | ZERO_KINDS.index(encoding.zero) << 8
        | GLOBAL_KINDS.index(encoding.scale_of_scales) << 12
        | encoding.is_high_first << 16
        | encoding.is_word_aligned << 17
        | is_sum << 18
    )
    group_rows, group_columns = encoding.group_rows or ALL_ROWS, encoding.group_columns or columns
    return Parameters(group_rows, group_columns, CODE_KINDS.index(encoding.codes), details)


@cache
def block_parameters(ranks: int) -> "ctypes.Array[ctypes.c_int32]":
    """The same of residual blocks."""
    return Parameters(ranks, 0, 0, 0)


def kernel_matrix_of(encoding: Encoding, rows: int, columns: int, parts: Mapping[str, torch.Tensor]) -> KernelMatrix:
    """A matrix of an encoding that `has_exact_kernel` as our C multiplies it.

    Raises:
        ValueError: if a part is missing, which our C would read.
    """
    parameters = kernel_parameters(encoding, columns)
    try:
        addresses = [parts[role].data_ptr() if role else 0 for role in encoding.kernel_roles]
    except KeyError:
        needed = [role for role in encoding.kernel_roles if role]
        raise ValueError(
            f"a matrix stored as {encoding.form} needs its {', '.join(needed)}; got {', '.join(parts) or 'nothing'}"
        ) from None
    return KernelMatrix(kernel_number(encoding), rows, columns, parameters, *addresses)


def expand(
    encoding: Encoding,
    parts: Mapping[str, torch.Tensor],
    rows: int,
    columns: int,
    out: torch.Tensor,
    *,
    is_transposed: bool,
) -> bool:
    """Write a stored matrix as bfloat16.

    Args:
        encoding: what the parts mean.
        parts: uint8, contiguous, by role.
        rows: of the stored matrix.
        columns: of the stored matrix.
        out: bfloat16 and contiguous; `[columns, rows]` if `is_transposed`, else `[rows, columns]`.
        is_transposed: write the transpose.

    Returns:
        Whether it was done; not where there is no C compiler.
    """
    if not has_exact_kernel(encoding):
        return False
    return expand_matrix(kernel_matrix_of(encoding, rows, columns, parts), out, is_transposed=is_transposed)


def expand_matrix(matrix: KernelMatrix, out: torch.Tensor, *, is_transposed: bool) -> bool:
    """Write a matrix of codes as bfloat16, as `expand` does."""
    if (function := _function()) is None:
        return False
    function(
        *(matrix.form, Parts(*matrix.parts), matrix.parameter, matrix.rows, matrix.columns),
        *(out.data_ptr(), is_transposed),
    )
    return True


def has_exact_kernel(encoding: Encoding) -> bool:
    """Whether C expands to the bits of the definition.

    It knows codes whose groups are neighbours: those of four and eight bits, and those of two and three bits whose
    scales and zeros are numbers of bfloat16. It rounds products of float32; those of float64 are the same if a factor
    is a power of two.
    """
    is_known = encoding.codes in CODE_KINDS and not encoding.has_order
    if encoding.bits < 4:
        is_usual = (encoding.scale, encoding.scale_of_scales, encoding.group_rows) == ("BF16", "none", 1)
        return is_known and is_usual and encoding.zero in ("none", "floats") and encoding.product in ("BF16", "F32")
    return is_known and (encoding.product != "F64" or encoding.scale == "LDEXP")


@cache
def _function() -> Any:
    types = (ctypes.c_int, Parts, Parameters, NUMBER, NUMBER, POINTER, ctypes.c_int)
    return c_function("expertier_expand_stored", *types)


assert set(SCALE_KINDS) < set(ITEM_BYTES)
