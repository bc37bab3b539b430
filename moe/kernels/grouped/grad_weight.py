"""Gradients of weights: each expert's rows are contiguous in grouped order, so each sum is one loop.

Operands that live in token order (the input, the gradient of the output) are gathered as they are read. Experts
without rows get zeros, so outputs need not be zeroed beforehand.

Shapes: T tokens, N routed rows in grouped order, C slots, O outputs, I inputs of the projection.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launching.launch import Launch, Run, arithmetic
from ..launching.tiles import Tile
from ..weights.weight_tile import memory_row
from .metadata import Groups


@triton.jit
def grad_weight_kernel(
    left_ptr,
    right_ptr,
    order_ptr,
    offset_ptr,
    grad_ptr,
    num_outputs,
    num_inputs,
    top_k,
    grad_stride_slot,
    grad_stride_out,
    grad_stride_in,
    HALVES: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of outputs by one block of inputs of one slot: sum over its rows of left^T right."""
    blocks_in = tl.cdiv(num_inputs, BLOCK_IN)
    out = (tl.program_id(0) // blocks_in) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    column = (tl.program_id(0) % blocks_in) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    slot = tl.program_id(1)
    is_out = out < num_outputs
    is_in = column < num_inputs
    first = tl.load(offset_ptr + slot)
    last = tl.load(offset_ptr + slot + 1)

    sum_OI = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=ACCUMULATE)
    for start in range(first, last, BLOCK_ROWS):
        place = start + tl.arange(0, BLOCK_ROWS)
        is_row = place < last
        if GATHER_LEFT or GATHER_RIGHT:
            token = tl.load(order_ptr + place, mask=is_row, other=0) // top_k
        left_row = (token if GATHER_LEFT else place).to(tl.int64)
        right_row = (token if GATHER_RIGHT else place).to(tl.int64)
        at_RO = left_row[:, None] * num_outputs + out[None, :]
        at_RI = right_row[:, None] * num_inputs + column[None, :]
        left_RO = tl.load(left_ptr + at_RO, mask=is_row[:, None] & is_out[None, :], other=0).to(COMPUTE)
        right_RI = tl.load(right_ptr + at_RI, mask=is_row[:, None] & is_in[None, :], other=0).to(COMPUTE)
        sum_OI = tl.dot(tl.trans(left_RO), right_RI, sum_OI, input_precision=PRECISION, out_dtype=ACCUMULATE)

    out_row = memory_row(out, num_outputs // 2, HALVES).to(tl.int64)
    at_OI = out_row[:, None] * grad_stride_out + column[None, :] * grad_stride_in
    grad = sum_OI.to(grad_ptr.dtype.element_ty)
    slot_ptr = grad_ptr + slot.to(tl.int64) * grad_stride_slot
    tl.store(slot_ptr + at_OI, grad, mask=is_out[:, None] & is_in[None, :])


def grad_weight(
    left: Tensor,
    right: Tensor,
    groups: Groups,
    top_k: int,
    grad_COI: Tensor,
    *,
    gathers_left: bool,
    gathers_right: bool,
    is_halves: bool,
    tile: Tile,
    run: Run,
) -> None:
    """Write `grad[c] = sum over rows of slot c of left[row]^T right[row]`.

    Args:
        left: [N, O] in grouped order, or [T, O] in token order where `gathers_left`; contiguous.
        right: [N, I] in grouped order, or [T, I] in token order where `gathers_right`; contiguous.
        groups: from `group_rows`.
        top_k: K, by which a routed row is divided to give its token.
        grad_COI: receives the gradient; any strides.
        gathers_left, gathers_right: which operands are in token order.
        is_halves: whether outputs arrive in pair order and are stored gates first.
        tile: tile sizes; `block_m` outputs by `block_n` inputs, `block_k` rows at a time.
        run: what to do with the launch.
    """
    num_slots, num_outputs, num_inputs = grad_COI.shape
    arguments = {
        "left_ptr": left,
        "right_ptr": right,
        "order_ptr": groups.order_N,
        "offset_ptr": groups.offset_C1,
        "grad_ptr": grad_COI,
        "num_outputs": num_outputs,
        "num_inputs": num_inputs,
        "top_k": top_k,
        "grad_stride_slot": grad_COI.stride(0),
        "grad_stride_out": grad_COI.stride(1),
        "grad_stride_in": grad_COI.stride(2),
        "HALVES": is_halves,
        "GATHER_LEFT": gathers_left,
        "GATHER_RIGHT": gathers_right,
        "BLOCK_OUT": tile.block_m,
        "BLOCK_IN": tile.block_n,
        "BLOCK_ROWS": tile.block_k,
        **arithmetic(left.dtype),
    }
    blocks = triton.cdiv(num_outputs, tile.block_m) * triton.cdiv(num_inputs, tile.block_n)
    run(Launch(grad_weight_kernel, (blocks, num_slots), arguments, tile.num_warps, tile.num_stages))
