"""The two products of a tile of rows with its slot's weights, which every kernel over row tiles is built around.

Shapes: M rows of a tile, O outputs and I inputs of the projection (of a block or of all).
"""

import triton
import triton.language as tl

from ..weights.weight_tile import load_weight, memory_row


@triton.jit
def rows_of_tile(offset_ptr, tile_start_ptr, tile, slot, BLOCK_M: tl.constexpr):
    """[M]: the places of a tile's rows in grouped order, and which of them belong to its slot."""
    place = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
    return place, place < tl.load(offset_ptr + slot + 1)


@triton.jit
def rows_by_weight(
    row_ptr_M,
    is_row_M,
    slot,
    out_O,
    is_out_O,
    num_inputs,
    projection,
    BLOCK_M: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN_IN: tl.constexpr,
    COMPUTE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[M, O]: through a projection, a sum over its inputs; `out_O` are rows of the weight in memory."""
    local = tl.arange(0, BLOCK_IN)
    sum_MO = tl.zeros((BLOCK_M, BLOCK_OUT), dtype=ACCUMULATE)
    for start in range(0, num_inputs, BLOCK_IN):
        mask = is_row_M[:, None]
        if not EVEN_IN:
            mask = mask & ((start + local)[None, :] < num_inputs)
        row_MI = tl.load(row_ptr_M[:, None] + (start + local)[None, :], mask=mask, other=0).to(COMPUTE)
        w_OI = load_weight(slot, out_O, is_out_O, start, num_inputs, projection, BLOCK_OUT, BLOCK_IN, EVEN_IN, COMPUTE)
        sum_MO = tl.dot(row_MI, tl.trans(w_OI), sum_MO, input_precision=PRECISION, out_dtype=ACCUMULATE)
    return sum_MO


@triton.jit
def rows_by_weight_back(
    row_ptr_M,
    is_row_M,
    slot,
    first_input,
    num_outputs,
    num_inputs,
    projection,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    EVEN_IN: tl.constexpr,
    COMPUTE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[M, I]: back through a projection to inputs from `first_input` on, a sum over its outputs in pair order."""
    local = tl.arange(0, BLOCK_OUT)
    sum_MI = tl.zeros((BLOCK_M, BLOCK_IN), dtype=ACCUMULATE)
    for start in range(0, num_outputs, BLOCK_OUT):
        out = start + local
        mask = is_row_M[:, None]
        is_out = tl.full((BLOCK_OUT,), 1, tl.int1)
        if not EVEN_OUT:
            is_out = out < num_outputs
            mask = mask & is_out[None, :]
        row_MO = tl.load(row_ptr_M[:, None] + out[None, :], mask=mask, other=0).to(COMPUTE)
        out_row = memory_row(out, num_outputs // 2, HALVES)
        w_OI = load_weight(
            slot, out_row, is_out, first_input, num_inputs, projection, BLOCK_OUT, BLOCK_IN, EVEN_IN, COMPUTE
        )
        sum_MI = tl.dot(row_MO, w_OI, sum_MI, input_precision=PRECISION, out_dtype=ACCUMULATE)
    return sum_MI
