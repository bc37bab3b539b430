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
from torch import Tensor

from ..grouped.metadata import slot_arguments
from ..launching.launch import Launch, Run, arithmetic
from ..launching.tiles import DECODE_TILES, DecodeTile, num_processors, number_format
from ..weights.quantise import QuantisedWeight
from ..weights.weight_tile import weight_arguments
from ..weights.weights import ExpertWeights
from .combine import combine_rows
from .kernels import decode_activation_kernel, decode_kernel

# routed rows up to which this path is taken; beyond, experts have enough rows for the grouped path. Every program holds
# all ids in registers, which bounds it too. Not tried on a GPU yet, like the two below
MAX_ROWS = 512
# programs per processor up to which sums are split: more hide latency, and more partial sums are written
PROGRAMS_PER_PROCESSOR = 2
MAX_SPLITS = 8


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
        x_TD: tokens in the dtype of products; contiguous, as are all three tensors.
        expert_TK: int32 or int64 expert ids; ids outside 0..E-1 contribute nothing.
        combine_TK: floating-point combine weights.
        weights: dense or quantised experts.
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
    """How the work is cut. Calls with equal plans are bit-identical, however many slots there are.

    Args:
        num_rows: routed rows, T * K; at most `MAX_ROWS`.
        num_groups: experts that may have rows; what rows per expert are estimated from.
        tile: sizes of one program's product.
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
        """The plan for `num_rows` rows of `num_groups` experts; `processors` are the device's if not given."""
        processors = num_processors(x_TD.device) if processors is None else processors
        numbers = number_format(x_TD.dtype)
        is_int4 = numbers == "half" and isinstance(weights.up, QuantisedWeight) and weights.up.format == "int4"
        tile = DECODE_TILES["int4" if is_int4 else numbers]
        splits = [
            _num_splits(weight, min(num_rows, num_groups), tile, processors) for weight in (weights.up, weights.down)
        ]
        return cls(num_rows, num_groups, tile, *splits)

    @property
    def block_t(self) -> int:
        """Columns of a product: twice the mean rows per expert; 16 is the least of a product, 64 fits in registers."""
        return min(max(16, triton.next_power_of_2(2 * self.num_rows // self.num_groups)), 64)

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
    tile, slot_E, num_slots = plan.tile, weights.slot_E, weights.num_slots
    weight, bias = (weights.up, weights.up_bias) if is_up else (weights.down, weights.down_bias)
    num_rows, num_outputs, num_inputs = expert_TK.numel(), *weight.shape[1:]
    described = weight_arguments(weight, tile.block_in)
    block_in = described["BLOCK_IN"]
    arguments = {
        **slot_arguments(expert_TK, slot_E, weights.num_experts, num_slots),
        "in_ptr": x,
        "bias_ptr": bias,
        "out_ptr": out,
        "num_outputs": num_outputs,
        "num_inputs": num_inputs,
        "inputs_per_split": triton.cdiv(triton.cdiv(num_inputs, block_in), num_splits) * block_in,
        "rows_per_input": rows_per_input,
        "in_stride": x.stride(0),
        "ACTIVATES": is_up and num_splits == 1,
        "BY_ROW": num_rows <= num_slots,
        "HALVES": is_up and weights.gates_first,
        "HAS_BIAS": bias is not None,
        "ROWS": max(16, triton.next_power_of_2(num_rows)),
        "BLOCK_T": plan.block_t,
        "BLOCK_OUT": tile.block_out,
        **described,
        **weights.activation.arguments(),
        **arithmetic(x.dtype),
    }
    grid = (triton.cdiv(num_outputs, tile.block_out), min(num_rows, num_slots), num_splits)
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
