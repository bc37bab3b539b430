"""The backward pass: activations are recomputed, expert outputs are not needed.

Shapes: T tokens, K experts per token, N = T * K routed rows, C slots, O up outputs, D model width, F expert width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..launching.launch import Run
from ..launching.tiles import LayerTiles
from ..weights.weights import ExpertWeights
from .gather_sum import gather_sum
from .grad_activation import grad_activation
from .grad_bias import bias_dot, grad_bias
from .grad_input import grad_input
from .grad_weight import grad_weight
from .metadata import Groups, TileMap, map_tiles


@dataclass(frozen=True)
class Needs:
    """Which gradients are asked for."""

    x: bool = True
    combine: bool = True
    up: bool = True
    down: bool = True
    up_bias: bool = True
    down_bias: bool = True


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients, each with the shape and strides of its tensor; None where `Needs` asks for none."""

    x_TD: Tensor | None
    combine_TK: Tensor | None
    up_COD: Tensor | None
    down_CDF: Tensor | None
    up_bias_CO: Tensor | None
    down_bias_CD: Tensor | None


def backward(
    grad_TD: Tensor,
    x_TD: Tensor,
    combine_TK: Tensor,
    pre_NO: Tensor,
    groups: Groups,
    weights: ExpertWeights,
    needs: Needs,
    tiles: LayerTiles,
    run: Run,
) -> Gradients:
    """Gradients of `forward`.

    Args:
        grad_TD: gradient of the output, contiguous, in the dtype of `x_TD`.
        x_TD, combine_TK, weights: as given to `forward`.
        pre_NO, groups: as returned by it.
        needs: which gradients to compute.
        tiles: tile sizes of every matrix product.
        run: what to do with the launches.
    """
    tile_map = map_tiles(groups, tiles.grad_activation.block_m, run)
    grad_pre_NO, weighted_NF, dot_BN = grad_activation(
        grad_TD,
        groups,
        tile_map,
        combine_TK,
        weights.down,
        pre_NO,
        weights.activation,
        tile=tiles.grad_activation,
        run=run,
    )
    top_k = combine_TK.shape[1]
    up_bias = weights.up_bias if needs.up_bias else None
    down_bias = weights.down_bias if needs.down_bias else None
    return Gradients(
        x_TD=_grad_x(grad_pre_NO, x_TD, groups, tile_map, weights, tiles, run) if needs.x else None,
        combine_TK=_grad_combine(dot_BN, combine_TK, grad_TD, groups, weights, run) if needs.combine else None,
        up_COD=_grad_up(grad_pre_NO, x_TD, groups, top_k, weights, tiles, run) if needs.up else None,
        down_CDF=_grad_down(grad_TD, weighted_NF, groups, top_k, weights, tiles, run) if needs.down else None,
        up_bias_CO=_grad_bias(grad_pre_NO, None, groups, top_k, up_bias, weights.gates_first, run),
        down_bias_CD=_grad_bias(grad_TD, combine_TK, groups, top_k, down_bias, False, run),
    )


def _grad_combine(
    dot_BN: Tensor, combine_TK: Tensor, grad_TD: Tensor, groups: Groups, weights: ExpertWeights, run: Run
) -> Tensor:
    grad_N = dot_BN.sum(0)
    if weights.down_bias is not None:
        dot_N = torch.zeros_like(grad_N)
        bias_dot(grad_TD, weights.down_bias, groups, dot_N, run)
        grad_N = grad_N + dot_N
    return grad_N.view_as(combine_TK).to(combine_TK.dtype)


def _grad_x(
    grad_pre_NO: Tensor,
    x_TD: Tensor,
    groups: Groups,
    tile_map: TileMap,
    weights: ExpertWeights,
    tiles: LayerTiles,
    run: Run,
) -> Tensor:
    grad_x_ND = x_TD.new_empty(len(grad_pre_NO), x_TD.shape[1])
    is_halves = weights.gates_first
    grad_input(
        grad_pre_NO, groups, tile_map, weights.up, grad_x_ND, is_halves=is_halves, tile=tiles.grad_input, run=run
    )
    grad_x_TD = torch.empty_like(x_TD)
    gather_sum(grad_x_ND, groups.position_N, None, grad_x_TD, run)
    return grad_x_TD


def _grad_up(
    grad_pre_NO: Tensor,
    x_TD: Tensor,
    groups: Groups,
    top_k: int,
    weights: ExpertWeights,
    tiles: LayerTiles,
    run: Run,
) -> Tensor:
    grad_COD = torch.empty_like(weights.up)
    grad_weight(
        grad_pre_NO,
        x_TD,
        groups,
        top_k,
        grad_COD,
        gathers_left=False,
        gathers_right=True,
        is_halves=weights.gates_first,
        tile=tiles.grad_weight,
        run=run,
    )
    return grad_COD


def _grad_down(
    grad_TD: Tensor,
    weighted_NF: Tensor,
    groups: Groups,
    top_k: int,
    weights: ExpertWeights,
    tiles: LayerTiles,
    run: Run,
) -> Tensor:
    grad_CDF = torch.empty_like(weights.down)
    grad_weight(
        grad_TD,
        weighted_NF,
        groups,
        top_k,
        grad_CDF,
        gathers_left=True,
        gathers_right=False,
        is_halves=False,
        tile=tiles.grad_weight,
        run=run,
    )
    return grad_CDF


def _grad_bias(
    rows: Tensor,
    combine_TK: Tensor | None,
    groups: Groups,
    top_k: int,
    bias: Tensor | None,
    is_halves: bool,
    run: Run,
) -> Tensor | None:
    if bias is None:
        return None
    grad = torch.empty_like(bias, memory_format=torch.contiguous_format)
    grad_bias(rows, combine_TK, groups, top_k, grad, is_halves, run)
    return grad
