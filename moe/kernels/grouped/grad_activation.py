"""Back through the down projection and the activation, which is recomputed from the pre-activation.

With dO the gradient of the layer's output, s a row's combine weight, A the activation and P the pre-activation:
dA' = dO W2, dP = s dA' act'(P), d(s) = rowsum(dA' A). So neither the expert outputs nor A are needed from the forward
pass. The kernel also writes s A, which the gradient of W2 is made of.

Shapes: T tokens, N routed rows in grouped order, C slots, O = 2F (F without a gate), D model width, F expert width,
Q row tiles.
Source: the d(s) identity as in SonicMoE, arXiv:2512.14080, section 4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching.launch import Launch, Run, arithmetic
from ..launching.tiles import Tile
from ..launching.tiling import tile_and_block
from ..weights.activation import Activation, activate_with_slopes, inner_and_slope
from ..weights.quantise import QuantisedWeight
from ..weights.weight_tile import Projection, weight_arguments
from .metadata import Groups, TileMap
from .product import rows_by_weight_back, rows_of_tile

# features per tile from which half are finished at a time: all 128 at once spilled 952 bytes per thread on sm90
FEATURES_IN_PARTS = 64
# features per tile at most: without a gate, 256 spilled 80 bytes on sm90 and 112 on sm100, see the record
# 2026-11-21_kernels-ahead-of-time
MOST_FEATURES = 128


@triton.jit
def write_gradients(
    raw_MF,
    combine_M,
    place_M,
    is_row_M,
    first_feature,
    pre_ptr,
    grad_pre_ptr,
    weighted_ptr,
    num_features,
    INNER: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_F: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Recompute a block of activations, write what follows from it, and return rowsum(raw * activation)."""
    feature = first_feature + tl.arange(0, BLOCK_F)
    place_M1 = place_M.to(tl.int64)[:, None]
    combine_M1 = combine_M[:, None]
    at_MF = place_M1 * num_features + feature[None, :]
    is_stored = is_row_M[:, None] & (feature < num_features)[None, :]
    if GATED:
        BLOCK_O: tl.constexpr = 2 * BLOCK_F
        out = 2 * first_feature + tl.arange(0, BLOCK_O)
        is_out = is_row_M[:, None] & (out < 2 * num_features)[None, :]
        at_MO = place_M1 * (2 * num_features) + out[None, :]
        pre_MO = tl.load(pre_ptr + at_MO, mask=is_out, other=0).to(ACCUMULATE)
        gate_MF, up_MF = tl.split(tl.reshape(pre_MO, (BLOCK_M, BLOCK_F, 2)))
        a_MF, gate_slope_MF, up_slope_MF = activate_with_slopes(gate_MF, up_MF, INNER, ALPHA, LIMIT, SHIFT)
        grad_MF = raw_MF * combine_M1
        pair = tl.join(grad_MF * gate_slope_MF, grad_MF * up_slope_MF)
        grad_pre = tl.reshape(pair, (BLOCK_M, BLOCK_O)).to(grad_pre_ptr.dtype.element_ty)
        tl.store(grad_pre_ptr + at_MO, grad_pre, mask=is_out)
    else:
        pre_MF = tl.load(pre_ptr + at_MF, mask=is_stored, other=0).to(ACCUMULATE)
        a_MF, slope_MF = inner_and_slope(pre_MF, INNER, ALPHA)
        grad_pre = (raw_MF * combine_M1 * slope_MF).to(grad_pre_ptr.dtype.element_ty)
        tl.store(grad_pre_ptr + at_MF, grad_pre, mask=is_stored)
    tl.store(weighted_ptr + at_MF, (a_MF * combine_M1).to(weighted_ptr.dtype.element_ty), mask=is_stored)
    return tl.sum(tl.where(is_stored, raw_MF * a_MF, 0.0), 1)


@triton.jit
def grad_activation_kernel(
    grad_ptr,
    order_ptr,
    offset_ptr,
    tile_slot_ptr,
    tile_start_ptr,
    combine_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    pre_ptr,
    grad_pre_ptr,
    weighted_ptr,
    grad_combine_ptr,
    num_rows,
    num_tiles,
    num_features,
    width,
    top_k,
    weight_stride_slot,
    weight_stride_out,
    weight_stride_in,
    scale_stride_slot,
    scale_stride_out,
    scale_stride_in,
    INNER: tl.constexpr,
    GATED: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    FORMAT: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    IN_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    EVEN_IN: tl.constexpr,
    IN_PARTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows by one block of features; the row sums of a block go to a plane of their own."""
    tile, block = tile_and_block(num_tiles, tl.cdiv(num_features, BLOCK_IN))
    slot = tl.load(tile_slot_ptr + tile)
    if slot < 0:
        return
    place, is_row = rows_of_tile(offset_ptr, tile_start_ptr, tile, slot, BLOCK_M)
    routed = tl.load(order_ptr + place, mask=is_row, other=0)
    first = block * BLOCK_IN
    raw_MF = rows_by_weight_back(
        grad_ptr + (routed // top_k).to(tl.int64) * width, is_row, slot, first, width, num_features,
        Projection(
            weight_ptr, scale_ptr, zero_ptr, weight_stride_slot, weight_stride_out, weight_stride_in,
            scale_stride_slot, scale_stride_out, scale_stride_in, FORMAT, OUT_GROUP, IN_GROUP,
        ),
        False, BLOCK_M, BLOCK_OUT, BLOCK_IN, EVEN_OUT, EVEN_IN, COMPUTE, ACCUMULATE, PRECISION,
    )  # fmt: skip

    combine_M = tl.load(combine_ptr + routed, mask=is_row, other=0).to(ACCUMULATE)
    if IN_PARTS:
        # half of the features at a time: all at once do not fit in registers
        HALF: tl.constexpr = BLOCK_IN // 2
        low_MF, high_MF = tl.split(tl.permute(tl.reshape(raw_MF, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        dot_M = write_gradients(
            low_MF, combine_M, place, is_row, first, pre_ptr, grad_pre_ptr, weighted_ptr, num_features,
            INNER, GATED, ALPHA, LIMIT, SHIFT, BLOCK_M, HALF, ACCUMULATE,
        )  # fmt: skip
        dot_M += write_gradients(
            high_MF, combine_M, place, is_row, first + HALF, pre_ptr, grad_pre_ptr, weighted_ptr, num_features,
            INNER, GATED, ALPHA, LIMIT, SHIFT, BLOCK_M, HALF, ACCUMULATE,
        )  # fmt: skip
    else:
        dot_M = write_gradients(
            raw_MF, combine_M, place, is_row, first, pre_ptr, grad_pre_ptr, weighted_ptr, num_features,
            INNER, GATED, ALPHA, LIMIT, SHIFT, BLOCK_M, BLOCK_IN, ACCUMULATE,
        )  # fmt: skip
    tl.store(grad_combine_ptr + block.to(tl.int64) * num_rows + routed, dot_M, mask=is_row)


def grad_activation(
    grad_TD: Tensor,
    groups: Groups,
    tiles: TileMap,
    combine_TK: Tensor,
    weight_CDF: Tensor | QuantisedWeight,
    pre_NO: Tensor,
    activation: Activation,
    *,
    tile: Tile,
    run: Run,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients at the up projection's outputs and at the combine weights.

    Args:
        grad_TD: gradient of the layer's output, contiguous.
        groups, tiles: from `group_rows`, or from `map_tiles` for other tile heights.
        combine_TK: the forward pass's combine weights, contiguous.
        weight_CDF: the down projection seen as [C, D, F].
        pre_NO: the pre-activation in pair order.
        activation: the function between the projections.
        tile: tile sizes; `block_n` counts outputs of the up projection.
        run: what to do with the launch.

    Returns:
        [N, O] gradient in pair order; [N, F] activations times combine weights; [blocks, N] whose sum over blocks is
        the gradient of the combine weights in routed order (zero for padding rows). Padding rows are
        uninitialised in the first two.
    """
    num_rows, num_outputs = pre_NO.shape
    outputs_per_feature = 2 if activation.gated else 1
    num_features, wanted = num_outputs // outputs_per_feature, tile.block_n // outputs_per_feature
    described = weight_arguments(weight_CDF, min(max(wanted, 16), MOST_FEATURES))
    num_blocks = triton.cdiv(num_features, described["BLOCK_IN"])
    width = grad_TD.shape[1]
    grad_pre_NO, weighted_NF, grad_combine_BN = _room_for_gradients(pre_NO, num_features, num_blocks)
    arguments = {
        "grad_ptr": grad_TD,
        "order_ptr": groups.order_N,
        **tiles.arguments(groups),
        "combine_ptr": combine_TK,
        "pre_ptr": pre_NO,
        "grad_pre_ptr": grad_pre_NO,
        "weighted_ptr": weighted_NF,
        "grad_combine_ptr": grad_combine_BN,
        "num_rows": num_rows,
        "num_features": num_features,
        "width": width,
        "top_k": num_rows // len(grad_TD),
        "BLOCK_OUT": tile.block_k,
        "EVEN_OUT": width % tile.block_k == 0,
        "IN_PARTS": described["BLOCK_IN"] >= FEATURES_IN_PARTS,
        **described,
        **activation.arguments(),
        **arithmetic(grad_TD.dtype),
    }
    run(Launch(grad_activation_kernel, (len(tiles.slot_Q) * num_blocks,), arguments, tile.num_warps, tile.num_stages))
    return grad_pre_NO, weighted_NF, grad_combine_BN


def _room_for_gradients(pre_NO: Tensor, num_features: int, num_blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel writes; only the sums are zeroed, because it leaves padding rows out."""
    num_rows = len(pre_NO)
    sum_dtype = torch.float64 if pre_NO.dtype == torch.float64 else torch.float32
    grad_combine_BN = torch.zeros(num_blocks, num_rows, dtype=sum_dtype, device=pre_NO.device)
    return torch.empty_like(pre_NO), pre_NO.new_empty(num_rows, num_features), grad_combine_BN
