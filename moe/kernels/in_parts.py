"""The forward pass in parts: experts arrive one after the other; the result is bit-identical to that of one call.

Every routed row has its own place in one buffer. The work is cut in the same way whichever slots hold the experts, and
the weighted sum runs once at the end. So neither the order of the parts nor the number of slots changes a bit.

Shapes: T tokens, K experts per token, N = T * K routed rows, E experts, C slots, D model width, S splits, Q tiles.
"""

from dataclasses import replace

import torch
from torch import Tensor

from .decode.combine import combine_rows
from .decode.rows import MAX_ROWS, DecodePlan, decode_rows
from .grouped.down import project_down
from .grouped.gather_sum import gather_sum
from .grouped.metadata import Groups, TileMap, group_rows
from .grouped.metadata_kernels import UNUSED
from .grouped.up import project_up
from .launching.launch import execute
from .launching.tuned import chosen_tiles
from .operators import on_device_of
from .weights.weights import ExpertWeights


class FewRows:
    """Parts of a decode step; see `rows_in_parts`."""

    def __init__(self, x_TD: Tensor, expert_TK: Tensor, weights: ExpertWeights) -> None:
        self._x_TD, self._expert_TK = x_TD, expert_TK
        self._num_experts = weights.num_experts
        self._plan = DecodePlan.of(x_TD, expert_TK.numel(), weights, self._num_experts)
        self._partial_SND = self._plan.empty_rows(x_TD)

    def compute(self, weights: ExpertWeights) -> None:
        """The rows of all experts that have a slot in `weights`."""
        with on_device_of(self._x_TD):
            decode_rows(self._x_TD, self._expert_TK, weights, self._plan, self._partial_SND, execute)

    def put(self, row_n: Tensor, y_nD: Tensor) -> None:
        """Outputs of routed rows that were computed elsewhere."""
        self._partial_SND[:, row_n] = 0
        self._partial_SND[0, row_n] = y_nD.to(self._partial_SND.dtype)

    def combine(self, combine_TK: Tensor) -> Tensor:
        """[T, D]; every row of every expert must have been computed."""
        y_TD = torch.empty_like(self._x_TD)
        E = self._num_experts
        with on_device_of(self._x_TD):
            combine_rows(self._partial_SND, self._expert_TK, combine_TK.contiguous(), None, E, E, y_TD, execute)
        return y_TD


class ManyRows:
    """Parts of a prefill step; see `rows_in_parts`."""

    def __init__(self, x_TD: Tensor, expert_TK: Tensor, weights: ExpertWeights) -> None:
        self._x_TD, E = x_TD, weights.num_experts
        self._tiles = chosen_tiles(x_TD.device, x_TD.dtype, expert_TK.numel(), weights)
        with on_device_of(x_TD):
            self._groups, self._map = group_rows(expert_TK, None, E, E, self._tiles.up.block_m, execute)
        self._activated_NF = x_TD.new_empty(expert_TK.numel(), weights.num_features)
        self._y_ND = x_TD.new_empty(expert_TK.numel(), x_TD.shape[1])

    def compute(self, weights: ExpertWeights) -> None:
        """The rows of all experts that have a slot in `weights`."""
        groups, tiles = self._in_slots(weights)
        with on_device_of(self._x_TD):
            project_up(self._x_TD, groups, tiles, weights, None, self._activated_NF, tile=self._tiles.up, run=execute)
            project_down(
                self._activated_NF, groups, tiles, weights.down, weights.down_bias, self._y_ND,
                tile=self._tiles.down, run=execute,
            )  # fmt: skip

    def put(self, row_n: Tensor, y_nD: Tensor) -> None:
        """Outputs of routed rows that were computed elsewhere."""
        self._y_ND[self._groups.position_N[row_n].long()] = y_nD.to(self._y_ND.dtype)

    def combine(self, combine_TK: Tensor) -> Tensor:
        """[T, D]; every row of every expert must have been computed."""
        y_TD = torch.empty_like(self._x_TD)
        with on_device_of(self._x_TD):
            gather_sum(self._y_ND, self._groups.position_N, combine_TK.contiguous(), y_TD, execute)
        return y_TD

    def _in_slots(self, weights: ExpertWeights) -> tuple[Groups, TileMap]:
        """Tiles by slot, not by expert; those of experts without a slot are unused. Rows end where the expert's do."""
        slot_E, end_E = weights.slot_E, self._groups.offset_C1[1:]
        if slot_E is None:
            return self._groups, self._map
        expert_Q = self._map.slot_Q
        slot_Q = torch.where(expert_Q >= 0, slot_E[expert_Q.clamp(min=0).long()], UNUSED.value)
        # experts without a slot write to the first element, which no tile reads
        offset_C1 = end_E.new_zeros(weights.num_slots + 1).scatter_(0, slot_E.long() + 1, end_E)
        return replace(self._groups, offset_C1=offset_C1), replace(self._map, slot_Q=slot_Q)


def rows_in_parts(x_TD: Tensor, expert_TK: Tensor, weights: ExpertWeights) -> FewRows | ManyRows:
    """One call of one layer, for experts that lie in slots or are still to come.

    Args:
        x_TD: tokens, in the dtype of the weights.
        expert_TK: int32 or int64 expert ids; ids outside 0..E-1 contribute nothing.
        weights: any slots of the layer, with `slot_E`; says shapes and activation, and is not computed with yet.

    Returns:
        An object with `compute(weights)`, once per expert in any grouping; `put` for rows that were computed elsewhere;
        and `combine`. The result is bit-identical to that of `compute_experts` with all experts
        in slots.
    """
    kind = FewRows if expert_TK.numel() <= MAX_ROWS else ManyRows
    return kind(x_TD.contiguous(), expert_TK.contiguous(), weights)
