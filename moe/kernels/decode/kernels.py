"""Kernels of the forward pass for few tokens; `rows.py` beside this file says how the work is cut and launches them.

Shapes: T tokens of a block, O outputs of a block, N = T * K routed rows in routed order, F expert width.
"""

import triton
import triton.language as tl

from ..grouped.metadata_kernels import slot_of
from ..weights.activation import activate, inner_and_slope
from ..weights.weight_tile import Projection, int4_bias, load_codes, load_scale, memory_row


@triton.jit
def my_slot(slot_R, row_R, group, num_slots, BY_ROW: tl.constexpr):
    """The slot of a program's group, `num_slots` for none: the group is a slot, or the first row that wants it."""
    if BY_ROW:
        slot = tl.sum(tl.where(row_R == group, slot_R, 0), 0)
        is_taken = tl.sum(((slot_R == slot) & (row_R < group)).to(tl.int32), 0) > 0
        return tl.where(is_taken, num_slots, slot)
    else:
        return group


@triton.jit
def weight_by_rows(
    row_ptr_T,
    is_row_T,
    slot,
    out_O,
    is_out_O,
    first_input,
    last_input,
    num_inputs,
    projection,
    BLOCK_T: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN_IN: tl.constexpr,
    COMPUTE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[O, T]: a sum over some of a projection's inputs; scales and zeros are applied to sums."""
    local = tl.arange(0, BLOCK_IN)
    sum_OT = tl.zeros((BLOCK_OUT, BLOCK_T), dtype=ACCUMULATE)
    for start in range(first_input, last_input, BLOCK_IN):
        mask = is_row_T[None, :]
        if not EVEN_IN:
            mask = mask & ((start + local)[:, None] < num_inputs)
        x_IT = tl.load(row_ptr_T[None, :] + (start + local)[:, None], mask=mask, other=0).to(COMPUTE)
        code_OI = load_codes(
            slot, out_O, is_out_O, start, num_inputs, projection, BLOCK_OUT, BLOCK_IN, EVEN_IN, COMPUTE
        )
        if projection.FORMAT == "dense":
            sum_OT = tl.dot(code_OI, x_IT, sum_OT, input_precision=PRECISION, out_dtype=ACCUMULATE)
        else:
            part_OT = tl.dot(code_OI, x_IT, input_precision=PRECISION, out_dtype=ACCUMULATE)
            scale_O = load_scale(projection.scale_ptr, slot, out_O, is_out_O, start, projection)
            if projection.FORMAT == "int4":
                zero_O = load_scale(projection.zero_ptr, slot, out_O, is_out_O, start, projection)
                x_sum_T = tl.sum(x_IT.to(ACCUMULATE), 0)
                part_OT -= (zero_O + int4_bias(COMPUTE))[:, None] * x_sum_T[None, :]
            sum_OT += part_OT * scale_O[:, None]
    return sum_OT


@triton.jit
def decode_kernel(
    in_ptr,
    expert_ptr,
    slot_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_experts,
    num_slots,
    num_outputs,
    num_inputs,
    inputs_per_split,
    rows_per_input,
    in_stride,
    weight_stride_slot,
    weight_stride_out,
    weight_stride_in,
    scale_stride_slot,
    scale_stride_out,
    scale_stride_in,
    ACTIVATES: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    BY_ROW: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INNER: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    FORMAT: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    IN_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN_IN: tl.constexpr,
    COMPUTE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of outputs of one group over one split of the inputs; `ACTIVATES` ends the up projection."""
    row_R = tl.arange(0, ROWS)
    slot_R = slot_of(expert_ptr, slot_ptr, row_R, row_R < num_rows, num_experts, num_slots, HAS_SLOTS)
    slot = my_slot(slot_R, row_R, tl.program_id(1), num_slots, BY_ROW)
    if slot >= num_slots:
        return
    is_mine_R = (slot_R == slot).to(tl.int32)
    rank_R = tl.cumsum(is_mine_R, 0) - 1
    count = tl.sum(is_mine_R, 0)

    block = tl.program_id(0)
    split = tl.program_id(2)
    out = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_out = out < num_outputs
    out_row = memory_row(out, num_outputs // 2, HALVES)
    first_input = split * inputs_per_split
    last_input = tl.minimum(first_input + inputs_per_split, num_inputs)

    for first in range(0, count, BLOCK_T):
        rank_T = first + tl.arange(0, BLOCK_T)
        is_row_T = rank_T < count
        is_same_TR = (rank_R[None, :] == rank_T[:, None]) & (is_mine_R[None, :] > 0)
        row_T = tl.sum(tl.where(is_same_TR, row_R[None, :], 0), 1)
        in_row_ptr = in_ptr + (row_T // rows_per_input).to(tl.int64) * in_stride

        sum_OT = weight_by_rows(
            in_row_ptr, is_row_T, slot, out_row, is_out, first_input, last_input, num_inputs,
            Projection(
                weight_ptr, scale_ptr, zero_ptr, weight_stride_slot, weight_stride_out, weight_stride_in,
                scale_stride_slot, scale_stride_out, scale_stride_in, FORMAT, OUT_GROUP, IN_GROUP,
            ),
            BLOCK_T, BLOCK_OUT, BLOCK_IN, EVEN_IN, COMPUTE, ACCUMULATE, PRECISION,
        )  # fmt: skip
        if HAS_BIAS:
            if split == 0:
                bias_O = tl.load(bias_ptr + slot.to(tl.int64) * num_outputs + out_row, mask=is_out, other=0)
                sum_OT += bias_O.to(ACCUMULATE)[:, None]
        if ACTIVATES:
            if GATED:
                pair = tl.permute(tl.reshape(sum_OT, (BLOCK_OUT // 2, 2, BLOCK_T)), (0, 2, 1))
                gate_FT, up_FT = tl.split(pair)
                y_FT = activate(gate_FT, up_FT, INNER, ALPHA, LIMIT, SHIFT)
                feature = block * (BLOCK_OUT // 2) + tl.arange(0, BLOCK_OUT // 2)
                num_features = num_outputs // 2
            else:
                y_FT, _ = inner_and_slope(sum_OT, INNER, ALPHA)
                feature = out
                num_features = num_outputs
            at_FT = row_T[None, :] * num_features + feature[:, None]
            is_stored = is_row_T[None, :] & (feature < num_features)[:, None]
            tl.store(out_ptr + at_FT, y_FT.to(out_ptr.dtype.element_ty), mask=is_stored)
        else:
            at_OT = (split * num_rows + row_T)[None, :] * num_outputs + out[:, None]
            tl.store(out_ptr + at_OT, sum_OT, mask=is_row_T[None, :] & is_out[:, None])


@triton.jit
def decode_activation_kernel(
    partial_ptr,
    activated_ptr,
    num_rows,
    num_features,
    num_splits,
    INNER: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Add the splits of one row's up projection and activate the sum; padding rows are computed too, and not read."""
    row = tl.program_id(0)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_feature = feature < num_features
    STEP: tl.constexpr = 2 if GATED else 1
    gate = tl.zeros((BLOCK,), dtype=ACCUMULATE)
    up = tl.zeros((BLOCK,), dtype=ACCUMULATE)
    for split in range(num_splits):
        ptr = partial_ptr + (split * num_rows + row) * (num_features * STEP) + feature * STEP
        gate += tl.load(ptr, mask=is_feature, other=0)
        if GATED:
            up += tl.load(ptr + 1, mask=is_feature, other=0)
    if GATED:
        y = activate(gate, up, INNER, ALPHA, LIMIT, SHIFT)
    else:
        y, _ = inner_and_slope(gate, INNER, ALPHA)
    tl.store(activated_ptr + row * num_features + feature, y.to(activated_ptr.dtype.element_ty), mask=is_feature)
