"""The forward pass for many tokens: group rows, project up and activate, project down, gather and sum.

Shapes: T tokens, K experts per token, N = T * K routed rows, O up outputs, D model width, F expert width.
"""

import torch
from torch import Tensor

from ..launching.launch import Run
from ..launching.tiles import LayerTiles
from ..weights.weights import ExpertWeights
from .down import project_down
from .gather_sum import gather_sum
from .metadata import Groups, group_rows
from .up import project_up


def forward(
    x_TD: Tensor,
    expert_TK: Tensor,
    combine_TK: Tensor,
    weights: ExpertWeights,
    tiles: LayerTiles,
    run: Run,
    *,
    saves: bool,
) -> tuple[Tensor, Tensor | None, Groups]:
    """Weighted sum of each token's experts.

    Args:
        x_TD: tokens in the dtype of products; contiguous, as are all three tensors.
        expert_TK: int32 or int64 expert ids; ids outside 0..E-1 contribute nothing.
        combine_TK: floating-point combine weights.
        weights: dense or quantised experts.
        tiles: tile sizes of every matrix product.
        run: what to do with the launches.
        saves: whether a backward pass follows.

    Returns:
        [T, D]; the pre-activation, [N, O] in pair order (None unless `saves`); the groups.
    """
    num_rows = expert_TK.numel()
    groups, tile_map = group_rows(
        expert_TK, weights.slot_E, weights.num_experts, weights.num_slots, tiles.up.block_m, run
    )
    pre_NO = x_TD.new_empty(num_rows, weights.num_outputs) if saves else None
    activated_NF = x_TD.new_empty(num_rows, weights.num_features)
    project_up(x_TD, groups, tile_map, weights, pre_NO, activated_NF, tile=tiles.up, run=run)
    y_ND = x_TD.new_empty(num_rows, x_TD.shape[1])
    project_down(activated_NF, groups, tile_map, weights.down, weights.down_bias, y_ND, tile=tiles.down, run=run)
    y_TD = torch.empty_like(x_TD)
    gather_sum(y_ND, groups.position_N, combine_TK, y_TD, run)
    return y_TD, pre_NO, groups
