"""Products of bfloat16 rows with frozen matrices as they lie, and with adapters, whose factors stay float32.

Sums do not depend on threads, nor on the rows beside.

Shapes: n rows, I inputs, O outputs of a matrix, r rank of an adapter.
"""

import ctypes
import functools
from typing import Any

import torch

from ...compute.adapters import LowRank
from ...compute.orders import SUMMING_ROWS, Order, orders
from ...native.kernel_matrix import plain_matrix
from ...native.library import NUMBER, POINTER, c_function

ROWS = (POINTER, NUMBER, NUMBER)
"""Types of the arguments that every function of low_rank.c takes first: rows, how many, how wide."""
MOST_RANK = 16
"""Of adapters that our C computes: it takes time in proportion to the rank, and tiles of torch's products do not. Not
tuned."""


def summing_order() -> Order | None:
    """The order of sums of products in both directions; None where torch's products are as quick."""
    try:
        order = orders()[0]
    except OSError:
        return None
    return order if order.name in SUMMING_ROWS else None


def product(order: Order, x_nI: torch.Tensor, matrix_IO: torch.Tensor) -> torch.Tensor:
    """`x @ matrix`, whichever of the matrix's dimensions lies in rows.

    Args:
        order: fits the matrix.
        x_nI, matrix_IO: bfloat16; x and the matrix, or its transpose, are contiguous.
    """
    out_nO = x_nI.new_empty(len(x_nI), matrix_IO.shape[1])
    if matrix_IO.is_contiguous():
        order.multiply_turned(x_nI, matrix_IO, out_nO)
    else:
        order.multiply(x_nI, (plain_matrix(matrix_IO.t()),), (out_nO,))
    return out_nO


def pass_back(
    low: LowRank, x_nI: torch.Tensor, inner_nr: torch.Tensor, grad_nO: torch.Tensor, grad_nI: torch.Tensor
) -> None:
    """Leave the gradients of an adapter's factors at them, and add that of the inputs to `grad_nI`."""
    b_rO = low.b_Or.detach().t().contiguous()
    grad_nr = inner(grad_nO, b_rO)
    low.b_Or.grad = outer(grad_nO, inner_nr, low.scale).t()
    low.a_rI.grad = outer(x_nI, grad_nr, low.scale)
    add(grad_nI, grad_nr, low.a_rI, low.scale)


def inner(x_nI: torch.Tensor, factor_rI: torch.Tensor) -> torch.Tensor:
    """`x @ factor.t()` in float32."""
    rows, columns, rank = *x_nI.shape, len(factor_rI)
    found_nr = torch.empty(rows, rank)
    _inner()(x_nI.data_ptr(), rows, columns, factor_rI.data_ptr(), rank, found_nr.data_ptr())
    return found_nr


def add(to_nO: torch.Tensor, inner_nr: torch.Tensor, factor_rO: torch.Tensor, scale: float) -> None:
    """`to += scale * inner @ factor`, rounded once."""
    rows, columns, rank = *to_nO.shape, len(factor_rO)
    given = (inner_nr.data_ptr(), factor_rO.data_ptr(), rank, scale)
    _add()(to_nO.data_ptr(), rows, columns, *given)


def outer(x_nI: torch.Tensor, inner_nr: torch.Tensor, scale: float) -> torch.Tensor:
    """`scale * inner.t() @ x` in float32."""
    rows, columns, rank = *x_nI.shape, inner_nr.shape[1]
    found_rI = torch.empty(rank, columns)
    given = (inner_nr.data_ptr(), rank, scale, found_rI.data_ptr())
    _outer()(x_nI.data_ptr(), rows, columns, *given)
    return found_rI


@functools.cache
def _inner() -> Any:
    return c_function("expertier_low_rank_inner", *ROWS, POINTER, NUMBER, POINTER)


@functools.cache
def _add() -> Any:
    return c_function("expertier_low_rank_add", *ROWS, POINTER, POINTER, NUMBER, ctypes.c_float)


@functools.cache
def _outer() -> Any:
    return c_function("expertier_low_rank_outer", *ROWS, POINTER, NUMBER, ctypes.c_float, POINTER)
