"""Down projection of grouped rows: each row by its expert's weights, plus bias; rows stay in grouped order.

Shapes: N routed rows in grouped order, C slots, F expert width, D model width, Q row tiles.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..launching.launch import Launch, Run, arithmetic
from ..launching.tiles import Tile
from ..launching.tiling import tile_and_block
from ..weights.quantise import QuantisedWeight
from ..weights.weight_tile import Projection, weight_arguments
from .metadata import Groups, TileMap
from .product import rows_by_weight, rows_of_tile


@triton.jit
def down_kernel(
    activated_ptr,
    offset_ptr,
    tile_slot_ptr,
    tile_start_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    bias_ptr,
    y_ptr,
    num_tiles,
    num_outputs,
    num_inputs,
    weight_stride_slot,
    weight_stride_out,
    weight_stride_in,
    scale_stride_slot,
    scale_stride_out,
    scale_stride_in,
    HAS_BIAS: tl.constexpr,
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
    """One tile of rows by one block of outputs."""
    tile, block = tile_and_block(num_tiles, tl.cdiv(num_outputs, BLOCK_OUT))
    slot = tl.load(tile_slot_ptr + tile)
    if slot < 0:
        return
    place, is_row = rows_of_tile(offset_ptr, tile_start_ptr, tile, slot, BLOCK_M)
    place = place.to(tl.int64)
    out = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_out = out < num_outputs
    sum_MO = rows_by_weight(
        activated_ptr + place * num_inputs, is_row, slot, out, is_out, num_inputs,
        Projection(
            weight_ptr, scale_ptr, zero_ptr, weight_stride_slot, weight_stride_out, weight_stride_in,
            scale_stride_slot, scale_stride_out, scale_stride_in, FORMAT, OUT_GROUP, IN_GROUP,
        ),
        BLOCK_M, BLOCK_OUT, BLOCK_IN, EVEN_IN, COMPUTE, ACCUMULATE, PRECISION,
    )  # fmt: skip

    if HAS_BIAS:
        bias_O = tl.load(bias_ptr + slot.to(tl.int64) * num_outputs + out, mask=is_out, other=0)
        sum_MO += bias_O.to(ACCUMULATE)[None, :]
    y = sum_MO.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + place[:, None] * num_outputs + out[None, :], y, mask=is_row[:, None] & is_out[None, :])


def project_down(
    activated_NF: Tensor,
    groups: Groups,
    tiles: TileMap,
    weight_COI: Tensor | QuantisedWeight,
    bias_CO: Tensor | None,
    y_ND: Tensor,
    *,
    tile: Tile,
    run: Run,
) -> None:
    """Write every computed row's expert output to `y_ND`; other rows stay as they are.

    Args:
        activated_NF: activations in grouped order, contiguous.
        groups, tiles: from `group_rows`, or from `map_tiles` for other tile heights.
        weight_COI: the down projection seen as [C, D, F].
        bias_CO: its bias, contiguous, or None.
        y_ND: receives the outputs in grouped order; contiguous.
        tile: sizes of one program's product; its `block_m` is that of `tiles`.
        run: what to do with the launch.
    """
    num_outputs, num_inputs = weight_COI.shape[1:]
    arguments = {
        "activated_ptr": activated_NF,
        **tiles.arguments(groups),
        "bias_ptr": bias_CO,
        "y_ptr": y_ND,
        "num_outputs": num_outputs,
        "num_inputs": num_inputs,
        "HAS_BIAS": bias_CO is not None,
        "BLOCK_OUT": tile.block_n,
        **weight_arguments(weight_COI, tile.block_k),
        **arithmetic(activated_NF.dtype),
    }
    grid = (len(tiles.slot_Q) * triton.cdiv(num_outputs, tile.block_n),)
    run(Launch(down_kernel, grid, arguments, tile.num_warps, tile.num_stages))
