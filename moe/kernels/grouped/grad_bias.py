"""Gradients of biases, and what the down projection's bias adds to the gradient of the combine weights.

Shapes: T tokens, N routed rows in grouped order, C slots, O outputs of the up projection, D model width.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launching.launch import Launch, Run, arithmetic
from ..weights.weight_tile import memory_row
from .metadata import Groups


@triton.jit
def grad_bias_kernel(
    rows_ptr,
    order_ptr,
    offset_ptr,
    combine_ptr,
    grad_ptr,
    width,
    top_k,
    HALVES: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One block of columns of one slot: sum over its rows, weighted by the combine weights where rows are gathered."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.program_id(1)
    is_column = column < width
    first = tl.load(offset_ptr + slot)
    last = tl.load(offset_ptr + slot + 1)
    total = tl.zeros((BLOCK,), dtype=ACCUMULATE)
    for start in range(first, last, BLOCK_ROWS):
        place = start + tl.arange(0, BLOCK_ROWS)
        is_row = place < last
        row = place
        if GATHER:
            routed = tl.load(order_ptr + place, mask=is_row, other=0)
            row = routed // top_k
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        value = tl.load(rows_ptr + at, mask=is_row[:, None] & is_column[None, :], other=0).to(ACCUMULATE)
        if GATHER:
            value *= tl.load(combine_ptr + routed, mask=is_row, other=0).to(ACCUMULATE)[:, None]
        total += tl.sum(value, 0)
    at_column = memory_row(column, width // 2, HALVES)
    grad = total.to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + slot.to(tl.int64) * width + at_column, grad, mask=is_column)


@triton.jit
def bias_dot_kernel(
    grad_ptr,
    order_ptr,
    offset_ptr,
    bias_ptr,
    dot_ptr,
    num_slots,
    width,
    top_k,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """One grouped row: the share of the down projection's bias in the gradient of its combine weight."""
    place = tl.program_id(0)
    if place < tl.load(offset_ptr + num_slots):
        bins = tl.arange(0, BINS)
        end = tl.load(offset_ptr + 1 + bins, mask=bins < num_slots, other=0x7FFFFFFF)
        slot = tl.sum((end <= place).to(tl.int32), 0)
        routed = tl.load(order_ptr + place)
        grad_row_ptr = grad_ptr + (routed // top_k).to(tl.int64) * width
        bias_row_ptr = bias_ptr + slot.to(tl.int64) * width
        total = tl.zeros((BLOCK,), dtype=ACCUMULATE)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            grad = tl.load(grad_row_ptr + column, mask=column < width, other=0).to(ACCUMULATE)
            bias = tl.load(bias_row_ptr + column, mask=column < width, other=0).to(ACCUMULATE)
            total += grad * bias
        tl.store(dot_ptr + routed, tl.sum(total, 0))


def grad_bias(
    rows: Tensor, combine_TK: Tensor | None, groups: Groups, top_k: int, grad_CO: Tensor, is_halves: bool, run: Run
) -> None:
    """Write the sum of each slot's rows.

    Args:
        rows: [N, O] in grouped order; or [T, O] in token order when `combine_TK` is given.
        combine_TK: combine weights that multiply gathered rows.
        groups: from `group_rows`.
        top_k: K, by which a routed row is divided to give its token.
        grad_CO: receives the sums, contiguous.
        is_halves: whether columns arrive in pair order and are stored gates first.
        run: what to do with the launch.
    """
    num_slots, width = grad_CO.shape
    block = min(triton.next_power_of_2(width), 128)
    arguments = {
        "rows_ptr": rows,
        "combine_ptr": combine_TK,
        "order_ptr": groups.order_N,
        "offset_ptr": groups.offset_C1,
        "grad_ptr": grad_CO,
        "width": width,
        "top_k": top_k,
        "HALVES": is_halves,
        "GATHER": combine_TK is not None,
        "BLOCK": block,
        "BLOCK_ROWS": 32,
        "ACCUMULATE": arithmetic(rows.dtype)["ACCUMULATE"],
    }
    run(Launch(grad_bias_kernel, (triton.cdiv(width, block), num_slots), arguments))


def bias_dot(grad_TD: Tensor, bias_CD: Tensor, groups: Groups, dot_N: Tensor, run: Run) -> None:
    """Write each computed row's `dot(grad of its token, bias of its slot)` in routed order; other rows stay.

    Args:
        grad_TD: gradient of the layer's output, contiguous.
        bias_CD: bias of the down projection, contiguous.
        groups: from `group_rows`.
        dot_N: receives the products in routed order; zeros beforehand.
        run: what to do with the launch.
    """
    num_rows, width = len(dot_N), grad_TD.shape[1]
    arguments = {
        "grad_ptr": grad_TD,
        "bias_ptr": bias_CD,
        "order_ptr": groups.order_N,
        "offset_ptr": groups.offset_C1,
        "dot_ptr": dot_N,
        "width": width,
        "top_k": num_rows // len(grad_TD),
        "num_slots": groups.num_slots,
        "BINS": triton.next_power_of_2(groups.num_slots),
        "BLOCK": min(triton.next_power_of_2(width), 1024),
        "ACCUMULATE": arithmetic(grad_TD.dtype)["ACCUMULATE"],
    }
    run(Launch(bias_dot_kernel, (num_rows,), arguments))
