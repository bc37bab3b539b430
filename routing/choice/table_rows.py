"""Products of tokens with rows of a large table, in runs of tokens, so that few picked rows are in memory at a time.

`gather_dot` and `gather_sum` are each other's gradients, so both directions keep the same memory. On a CPU, C reads the
picked rows of a float32 table where they lie; torch would copy them first.

Shapes: T tokens, K picked rows per token, N rows of the table, D their width.
"""

import ctypes
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..ground.c_library import compile_library
from .plain_tensors import has_plain_memory, is_transformed

# Bounds the picked rows in memory to 4 MiB of float32, whatever T is. From 2^16 to 2^20 the speed is the same on one
# core; 2^22 and 2^24 are a third slower, as runs leave the cache.
ELEMENTS_AT_ONCE = 2**20


def gather_dot(x_TD: Tensor, table_ND: Tensor, row_TK: Tensor) -> Tensor:
    """[T, K]: the dot product of each token with each of its rows; the same as `(table[row] * x[:, None]).sum(-1)`.

    Args:
        x_TD: tokens, in the table's dtype.
        table_ND: the table; its gradient is dense.
        row_TK: int64 rows of each token, 0..N-1; a row may be picked twice.
    """
    if is_transformed(x_TD, table_ND):
        return (table_ND[row_TK] * x_TD[:, None]).sum(dim=-1)
    return _GatherDot.apply(x_TD, table_ND, row_TK)


def gather_sum(weight_TK: Tensor, table_ND: Tensor, row_TK: Tensor) -> Tensor:
    """[T, D]: the weighted sum of each token's rows; the same as `(table[row] * weight[..., None]).sum(1)`.

    Args:
        weight_TK: factor of each picked row, in the table's dtype.
        table_ND: the table; its gradient is dense.
        row_TK: int64 rows of each token, 0..N-1; a row may be picked twice.
    """
    if is_transformed(weight_TK, table_ND):
        return (table_ND[row_TK] * weight_TK[..., None]).sum(dim=1)
    return _GatherSum.apply(weight_TK, table_ND, row_TK)


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, table_ND: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, table_ND, row_TK)
        return _dot(x_TD, table_ND, row_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TD, table_ND, row_TK = ctx.saved_tensors
        wants_x, wants_table, _ = ctx.needs_input_grad
        grad_x = _sum(grad_TK, table_ND, row_TK) if wants_x else None
        return grad_x, _scatter(grad_TK, x_TD, table_ND, row_TK) if wants_table else None, None


class _GatherSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_TK: Tensor, table_ND: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(weight_TK, table_ND, row_TK)
        return _sum(weight_TK, table_ND, row_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight_TK, table_ND, row_TK = ctx.saved_tensors
        wants_weight, wants_table, _ = ctx.needs_input_grad
        grad_weight = _dot(grad_TD, table_ND, row_TK) if wants_weight else None
        return grad_weight, _scatter(weight_TK, grad_TD, table_ND, row_TK) if wants_table else None, None


@functools.cache
def _kernels() -> ctypes.CDLL | None:
    """The compiled `table_rows.c`; None without a C compiler."""
    try:
        found = compile_library((Path(__file__).parent / "table_rows.c",))
    except OSError:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.expertier_gather_dot.argtypes = [pointer] * 3 + [number] * 3 + [pointer]
    found.expertier_scatter_rows.argtypes = [pointer] * 3 + [number] * 4 + [pointer]
    found.expertier_gather_dot.restype = found.expertier_scatter_rows.restype = None
    return found


def _kernels_for(row_TK: Tensor, *tensors: Tensor) -> ctypes.CDLL | None:
    """The C, where it can read these tensors; rows outside of the table are left to torch, which names them."""
    is_plain = all(x.dtype == torch.float32 and x.device.type == "cpu" and has_plain_memory(x) for x in tensors)
    if not (is_plain and row_TK.dtype == torch.int64 and has_plain_memory(row_TK) and row_TK.numel()):
        return None
    low, high = row_TK.aminmax()
    return _kernels() if low >= 0 and high < len(tensors[0]) else None


def _dot(x_TD: Tensor, table_ND: Tensor, row_TK: Tensor) -> Tensor:
    kernels, (T, K) = _kernels_for(row_TK, table_ND, x_TD), row_TK.shape
    if kernels is not None:
        table_ND, x_TD, row_TK = table_ND.contiguous(), x_TD.contiguous(), row_TK.contiguous()
        out_TK = x_TD.new_empty(T, K)
        addresses = (x_TD.data_ptr(), table_ND.data_ptr(), row_TK.data_ptr())
        kernels.expertier_gather_dot(*addresses, T, K, table_ND.shape[1], out_TK.data_ptr())
        return out_TK
    out_TK = x_TD.new_empty(row_TK.shape)
    for part in slices(len(row_TK), row_TK.shape[1] * table_ND.shape[1]):
        out_TK[part] = (table_ND[row_TK[part]] @ x_TD[part, :, None]).squeeze(-1)
    return out_TK


def _sum(weight_TK: Tensor, table_ND: Tensor, row_TK: Tensor) -> Tensor:
    return embedding_bag(row_TK, table_ND, per_sample_weights=weight_TK.contiguous(), mode="sum")


def _scatter(weight_TK: Tensor, x_TD: Tensor, table_ND: Tensor, row_TK: Tensor) -> Tensor:
    kernels, (T, K) = _kernels_for(row_TK, table_ND, weight_TK, x_TD), row_TK.shape
    if kernels is not None:
        # numpy asks the system for pages of zeros, and large ones; torch would write every page once more
        grad_ND = torch.from_numpy(np.zeros(table_ND.shape, np.float32))
        weight_TK, x_TD, row_TK = weight_TK.contiguous(), x_TD.contiguous(), row_TK.contiguous()
        addresses = (weight_TK.data_ptr(), x_TD.data_ptr(), row_TK.data_ptr())
        kernels.expertier_scatter_rows(*addresses, T, K, x_TD.shape[1], torch.get_num_threads(), grad_ND.data_ptr())
        return grad_ND
    grad_ND = torch.zeros_like(table_ND, memory_format=torch.contiguous_format)
    for part in slices(len(row_TK), row_TK.shape[1] * table_ND.shape[1]):
        share = weight_TK[part, :, None] * x_TD[part, None]
        grad_ND.index_add_(0, row_TK[part].flatten(), share.flatten(0, 1))
    return grad_ND


def slices(num_tokens: int, elements_per_token: int) -> Iterator[slice]:
    """Runs of tokens that together make at most `ELEMENTS_AT_ONCE` elements, and at least one token each."""
    step = max(1, ELEMENTS_AT_ONCE // max(elements_per_token, 1))
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + step, num_tokens))
