"""Back through the up projection to its input: each grouped row's gradient times its expert's weights.

Shapes: N routed rows in grouped order, C slots, O = 2F (F without a gate), D model width, Q row tiles.
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
from .product import rows_by_weight_back, rows_of_tile


@triton.jit
def grad_input_kernel(
    grad_pre_ptr,
    offset_ptr,
    tile_slot_ptr,
    tile_start_ptr,
    weight_ptr,
    scale_ptr,
    zero_ptr,
    grad_x_ptr,
    num_tiles,
    num_outputs,
    num_inputs,
    weight_stride_slot,
    weight_stride_out,
    weight_stride_in,
    scale_stride_slot,
    scale_stride_out,
    scale_stride_in,
    HALVES: tl.constexpr,
    FORMAT: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    IN_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN_OUT: tl.constexpr,
    EVEN_IN: tl.constexpr,
    COMPUTE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows by one block of the model width."""
    tile, block = tile_and_block(num_tiles, tl.cdiv(num_inputs, BLOCK_IN))
    slot = tl.load(tile_slot_ptr + tile)
    if slot < 0:
        return
    place, is_row = rows_of_tile(offset_ptr, tile_start_ptr, tile, slot, BLOCK_M)
    place = place.to(tl.int64)
    sum_MI = rows_by_weight_back(
        grad_pre_ptr + place * num_outputs, is_row, slot, block * BLOCK_IN, num_outputs, num_inputs,
        Projection(
            weight_ptr, scale_ptr, zero_ptr, weight_stride_slot, weight_stride_out, weight_stride_in,
            scale_stride_slot, scale_stride_out, scale_stride_in, FORMAT, OUT_GROUP, IN_GROUP,
        ),
        HALVES, BLOCK_M, BLOCK_OUT, BLOCK_IN, EVEN_OUT, EVEN_IN, COMPUTE, ACCUMULATE, PRECISION,
    )  # fmt: skip
    column = block * BLOCK_IN + tl.arange(0, BLOCK_IN)
    is_stored = is_row[:, None] & (column < num_inputs)[None, :]
    at_MI = place[:, None] * num_inputs + column[None, :]
    tl.store(grad_x_ptr + at_MI, sum_MI.to(grad_x_ptr.dtype.element_ty), mask=is_stored)


def grad_input(
    grad_pre_NO: Tensor,
    groups: Groups,
    tiles: TileMap,
    weight_COD: Tensor | QuantisedWeight,
    grad_x_ND: Tensor,
    *,
    is_halves: bool,
    tile: Tile,
    run: Run,
) -> None:
    """Write every computed row's gradient with respect to its token; other rows stay as they are.

    Args:
        grad_pre_NO: gradient at the up projection's outputs, in pair order, contiguous.
        groups, tiles: from `group_rows`, or from `map_tiles` for other tile heights.
        weight_COD: the up projection seen as [C, O, D].
        grad_x_ND: receives the gradients in grouped order; contiguous.
        is_halves: whether gates lie before ups in memory.
        tile: sizes of one program's product; its `block_m` is that of `tiles`.
        run: what to do with the launch.
    """
    num_outputs, num_inputs = weight_COD.shape[1:]
    described = weight_arguments(weight_COD, tile.block_n)
    arguments = {
        "grad_pre_ptr": grad_pre_NO,
        **tiles.arguments(groups),
        "grad_x_ptr": grad_x_ND,
        "num_outputs": num_outputs,
        "num_inputs": num_inputs,
        "HALVES": is_halves,
        "BLOCK_OUT": tile.block_k,
        "EVEN_OUT": num_outputs % tile.block_k == 0,
        **described,
        **arithmetic(grad_pre_NO.dtype),
    }
    grid = (len(tiles.slot_Q) * triton.cdiv(num_inputs, described["BLOCK_IN"]),)
    run(Launch(grad_input_kernel, grid, arguments, tile.num_warps, tile.num_stages))
