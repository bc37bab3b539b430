"""The forward pass for few tokens: no sort, no atomics, the weights of each active expert read once.

A program belongs to one expert and one block of outputs. It finds its tokens among the ids itself, and takes weights as
the rows of the matrix product and tokens as its columns, so that few tokens still fill the tensor cores' shape.
Quantised codes enter the product as they are; scales and zeros are applied to the sums, once per group of inputs.
Where there are too few programs to fill the device, the sum over inputs is split and put together by the next kernel.

Shapes: T tokens, K experts per token, N = T * K routed rows in routed order, C slots, O up outputs, D model width,
F expert width, S splits.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..grouped.metadata import slot_of
from ..launching.launch import Launch, Run, arithmetic
from ..launching.tiles import DECODE_TILES, DecodeTile, num_processors, number_format
from ..weights.activation import activate, inner_and_slope
from ..weights.quantise import QuantisedWeight
from ..weights.weight_tile import Projection, int4_bias, load_codes, load_scale, memory_row, weight_arguments
from ..weights.weights import ExpertWeights
from .combine import combine_rows

# the path is taken up to here; beyond, each expert has enough rows for the grouped path
MAX_ROWS = 512
PROGRAMS_PER_PROCESSOR = 2
MAX_SPLITS = 8


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
    """Add the splits of one row's up projection and activate the sum; of rows of nobody, which nobody reads, too."""
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


def decode(
    x_TD: Tensor,
    expert_TK: Tensor,
    combine_TK: Tensor,
    weights: ExpertWeights,
    run: Run,
    processors: int | None = None,
) -> Tensor:
    """Weighted sum of each token's experts, for at most `MAX_ROWS` routed rows.

    Args:
        x_TD: tokens, contiguous.
        expert_TK: expert ids, contiguous.
        combine_TK: combine weights, contiguous.
        weights: the experts.
        run: what to do with the launches.
        processors: how many the work is spread over; those of the device if not given.

    Returns:
        [T, D].
    """
    plan = DecodePlan.of(x_TD, expert_TK.numel(), weights, weights.num_slots, processors)
    partial_SND = plan.empty_rows(x_TD)
    decode_rows(x_TD, expert_TK, weights, plan, partial_SND, run)
    y_TD = torch.empty_like(x_TD)
    combine_rows(partial_SND, expert_TK, combine_TK, weights.slot_E, weights.num_experts, weights.num_slots, y_TD, run)
    return y_TD


@dataclass(frozen=True)
class DecodePlan:
    """How the work is cut. Two calls with the same plan give the same bits, however many slots there are.

    Args:
        num_rows: routed rows.
        num_groups: experts that may have rows; what rows per expert are estimated from.
        tile: tile sizes.
        up_splits, down_splits: parts of the sums over inputs.
    """

    num_rows: int
    num_groups: int
    tile: DecodeTile
    up_splits: int
    down_splits: int

    @classmethod
    def of(
        cls, x_TD: Tensor, num_rows: int, weights: ExpertWeights, num_groups: int, processors: int | None = None
    ) -> "DecodePlan":
        """The plan for so many rows of so many experts; `processors` are those of the device if not given."""
        processors = num_processors(x_TD.device) if processors is None else processors
        numbers = number_format(x_TD.dtype)
        is_int4 = numbers == "half" and isinstance(weights.up, QuantisedWeight) and weights.up.format == "int4"
        tile = DECODE_TILES["int4" if is_int4 else numbers]
        splits = [
            _num_splits(weight, min(num_rows, num_groups), tile, processors) for weight in (weights.up, weights.down)
        ]
        return cls(num_rows, num_groups, tile, *splits)

    def empty_rows(self, x_TD: Tensor) -> Tensor:
        """Room for what `decode_rows` writes, [S, N, D]."""
        return x_TD.new_empty(self.down_splits, self.num_rows, x_TD.shape[1], dtype=_sum_dtype(x_TD))


def decode_rows(
    x_TD: Tensor, expert_TK: Tensor, weights: ExpertWeights, plan: DecodePlan, partial_SND: Tensor, run: Run
) -> None:
    """Write the outputs of all rows whose expert has a slot; other rows of `partial_SND` stay as they are."""
    num_rows, top_k = expert_TK.numel(), expert_TK.shape[1]
    activated_NF = x_TD.new_empty(num_rows, weights.num_features)
    up_out = activated_NF
    if plan.up_splits > 1:
        up_out = x_TD.new_empty(plan.up_splits, num_rows, weights.num_outputs, dtype=_sum_dtype(x_TD))
    _product(x_TD, top_k, expert_TK, weights, True, up_out, plan.up_splits, plan, run)
    if plan.up_splits > 1:
        _activate_splits(up_out, activated_NF, weights, run)
    _product(activated_NF, 1, expert_TK, weights, False, partial_SND, plan.down_splits, plan, run)


def _sum_dtype(x_TD: Tensor) -> torch.dtype:
    return torch.float64 if x_TD.dtype == torch.float64 else torch.float32


def _num_splits(weight: Tensor | QuantisedWeight, num_groups: int, tile: DecodeTile, processors: int) -> int:
    _, num_outputs, num_inputs = weight.shape
    programs = num_groups * triton.cdiv(num_outputs, tile.block_out)
    wanted = triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, programs)
    return max(1, min(wanted, MAX_SPLITS, num_inputs // (4 * tile.block_in)))


def _product(
    x: Tensor,
    rows_per_input: int,
    expert_TK: Tensor,
    weights: ExpertWeights,
    is_up: bool,
    out: Tensor,
    num_splits: int,
    plan: DecodePlan,
    run: Run,
) -> None:
    tile = plan.tile
    weight, bias = (weights.up, weights.up_bias) if is_up else (weights.down, weights.down_bias)
    num_rows = expert_TK.numel()
    _, num_outputs, num_inputs = weight.shape
    described = weight_arguments(weight, tile.block_in)
    block_in = described["BLOCK_IN"]
    block_t = min(max(16, triton.next_power_of_2(2 * num_rows // plan.num_groups)), 64)
    arguments = {
        "in_ptr": x,
        "expert_ptr": expert_TK,
        "slot_ptr": weights.slot_E,
        "bias_ptr": bias,
        "out_ptr": out,
        "num_rows": num_rows,
        "num_experts": weights.num_experts,
        "num_slots": weights.num_slots,
        "num_outputs": num_outputs,
        "num_inputs": num_inputs,
        "inputs_per_split": triton.cdiv(triton.cdiv(num_inputs, block_in), num_splits) * block_in,
        "rows_per_input": rows_per_input,
        "in_stride": x.stride(0),
        "ACTIVATES": is_up and num_splits == 1,
        "HAS_SLOTS": weights.slot_E is not None,
        "BY_ROW": num_rows <= weights.num_slots,
        "HALVES": is_up and weights.gates_first,
        "HAS_BIAS": bias is not None,
        "ROWS": max(16, triton.next_power_of_2(num_rows)),
        "BLOCK_T": block_t,
        "BLOCK_OUT": tile.block_out,
        **described,
        **weights.activation.arguments(),
        **arithmetic(x.dtype),
    }
    grid = (triton.cdiv(num_outputs, tile.block_out), min(num_rows, weights.num_slots), num_splits)
    run(Launch(decode_kernel, grid, arguments, tile.num_warps, tile.num_stages))


def _activate_splits(partial_SNO: Tensor, activated_NF: Tensor, weights: ExpertWeights, run: Run) -> None:
    num_rows, num_features = activated_NF.shape
    block = min(triton.next_power_of_2(num_features), 256)
    arguments = {
        "partial_ptr": partial_SNO,
        "activated_ptr": activated_NF,
        "num_rows": num_rows,
        "num_features": num_features,
        "num_splits": len(partial_SNO),
        "BLOCK": block,
        "ACCUMULATE": arithmetic(activated_NF.dtype)["ACCUMULATE"],
        **weights.activation.arguments(),
    }
    run(Launch(decode_activation_kernel, (num_rows, triton.cdiv(num_features, block)), arguments))
