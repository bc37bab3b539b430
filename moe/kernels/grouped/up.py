"""Up projection: gather tokens, multiply by their experts' gate and up weights, add bias, activate; one kernel.

Shapes: T tokens, N routed rows in grouped order, C slots, O = 2F outputs (F without a gate), D model width, F expert
width, Q row tiles.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launching.launch import Launch, Run, arithmetic
from ..launching.tiles import Tile
from ..launching.tiling import tile_and_block
from ..weights.activation import activate, inner_and_slope
from ..weights.weight_tile import Projection, memory_row, weight_arguments
from ..weights.weights import ExpertWeights
from .metadata import Groups, TileMap
from .metadata_kernels import PADDING
from .product import rows_by_weight, rows_of_tile


@triton.jit
def up_kernel(
    x_ptr,
    order_ptr,
    offset_ptr,
    tile_slot_ptr,
    tile_start_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    pre_ptr,
    activated_ptr,
    num_rows,
    num_tiles,
    num_outputs,
    num_inputs,
    top_k,
    x_stride,
    weight_stride_slot,
    weight_stride_out,
    weight_stride_in,
    scale_stride_slot,
    scale_stride_out,
    scale_stride_in,
    HALVES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE_PRE: tl.constexpr,
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
    EVEN_IN: tl.constexpr,
    COMPUTE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows by one block of outputs in pair order."""
    tile, block = tile_and_block(num_tiles, tl.cdiv(num_outputs, BLOCK_OUT))
    slot = tl.load(tile_slot_ptr + tile)
    out = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_out = out < num_outputs
    if slot < 0:
        if SAVE_PRE:
            # an operator's output must be defined everywhere
            if slot == PADDING:
                place = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
                nothing = tl.zeros((BLOCK_M, BLOCK_OUT), dtype=pre_ptr.dtype.element_ty)
                pre_tile_ptr = pre_ptr + place.to(tl.int64)[:, None] * num_outputs + out[None, :]
                tl.store(pre_tile_ptr, nothing, mask=(place < num_rows)[:, None] & is_out[None, :])
        return
    place, is_row = rows_of_tile(offset_ptr, tile_start_ptr, tile, slot, BLOCK_M)
    token = tl.load(order_ptr + place, mask=is_row, other=0) // top_k
    out_row = memory_row(out, num_outputs // 2, HALVES)
    sum_MO = rows_by_weight(
        x_ptr + token.to(tl.int64) * x_stride, is_row, slot, out_row, is_out, num_inputs,
        Projection(
            weight_ptr, scale_ptr, zero_ptr, weight_stride_slot, weight_stride_out, weight_stride_in,
            scale_stride_slot, scale_stride_out, scale_stride_in, FORMAT, OUT_GROUP, IN_GROUP,
        ),
        BLOCK_M, BLOCK_OUT, BLOCK_IN, EVEN_IN, COMPUTE, ACCUMULATE, PRECISION,
    )  # fmt: skip

    if HAS_BIAS:
        bias_O = tl.load(bias_ptr + slot.to(tl.int64) * num_outputs + out_row, mask=is_out, other=0)
        sum_MO += bias_O.to(ACCUMULATE)[None, :]
    place = place.to(tl.int64)[:, None]
    if SAVE_PRE:
        pre = sum_MO.to(pre_ptr.dtype.element_ty)
        tl.store(pre_ptr + place * num_outputs + out[None, :], pre, mask=is_row[:, None] & is_out[None, :])
    if GATED:
        gate_MF, up_MF = tl.split(tl.reshape(sum_MO, (BLOCK_M, BLOCK_OUT // 2, 2)))
        y_MF = activate(gate_MF, up_MF, INNER, ALPHA, LIMIT, SHIFT)
        feature = block * (BLOCK_OUT // 2) + tl.arange(0, BLOCK_OUT // 2)
        num_features = num_outputs // 2
    else:
        y_MF, _ = inner_and_slope(sum_MO, INNER, ALPHA)
        feature = out
        num_features = num_outputs
    y = y_MF.to(activated_ptr.dtype.element_ty)
    is_stored = is_row[:, None] & (feature < num_features)[None, :]
    tl.store(activated_ptr + place * num_features + feature[None, :], y, mask=is_stored)


def project_up(
    x_TD: Tensor,
    groups: Groups,
    tiles: TileMap,
    weights: ExpertWeights,
    pre_NO: Tensor | None,
    activated_NF: Tensor,
    *,
    tile: Tile,
    run: Run,
) -> None:
    """Write the activations of every computed row, and the pre-activation where `pre_NO` is given.

    Args:
        x_TD: tokens; unit stride along D.
        groups, tiles: from `group_rows`, or from `map_tiles` for other tile heights.
        weights: the experts, of which the up projection, its bias and the activation are used.
        pre_NO: receives the sums in pair order, for the backward pass.
        activated_NF: receives the activations in grouped order; contiguous.
        tile: sizes of one program's product; its `block_m` is that of `tiles`.
        run: what to do with the launch.
    """
    bias_CO, num_outputs = weights.up_bias, weights.num_outputs
    num_rows = len(groups.order_N)
    arguments = {
        "x_ptr": x_TD,
        "order_ptr": groups.order_N,
        **tiles.arguments(groups),
        "bias_ptr": bias_CO,
        "pre_ptr": pre_NO,
        "activated_ptr": activated_NF,
        "num_rows": num_rows,
        "num_outputs": num_outputs,
        "num_inputs": weights.width,
        "top_k": num_rows // len(x_TD),
        "x_stride": x_TD.stride(0),
        "HALVES": weights.gates_first,
        "HAS_BIAS": bias_CO is not None,
        "SAVE_PRE": pre_NO is not None,
        "BLOCK_OUT": tile.block_n,
        **weight_arguments(weights.up, tile.block_k),
        **weights.activation.arguments(),
        **arithmetic(x_TD.dtype),
    }
    grid = (len(tiles.slot_Q) * triton.cdiv(num_outputs, tile.block_n),)
    run(Launch(up_kernel, grid, arguments, tile.num_warps, tile.num_stages))
