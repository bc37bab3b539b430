"""Back through the up projection to its input: each grouped row's gradient times its expert's weights.

Shapes: N routed rows in grouped order, C slots, O = 2F (F without a gate), D model width, I row tiles.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, Run, arithmetic
from .metadata import Groups, TileMap
from .tiles import Tile
from .tiling import tile_and_block
from .weight_tile import memory_row


@triton.jit
def grad_input_kernel(
    grad_pre_ptr,
    offset_ptr,
    tile_slot_ptr,
    tile_start_ptr,
    weight_ptr,
    grad_x_ptr,
    num_tiles,
    num_outputs,
    width,
    weight_stride_slot,
    weight_stride_out,
    weight_stride_in,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    EVEN_O: tl.constexpr,
    COMPUTE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows by one block of the model width."""
    tile, block = tile_and_block(num_tiles, tl.cdiv(width, BLOCK_D))
    slot = tl.load(tile_slot_ptr + tile)
    if slot < 0:
        return
    place = tl.load(tile_start_ptr + tile) + tl.arange(0, BLOCK_M)
    is_row = place < tl.load(offset_ptr + slot + 1)
    place = place.to(tl.int64)
    row_ptr = grad_pre_ptr + place * num_outputs
    column = block * BLOCK_D + tl.arange(0, BLOCK_D)
    is_column = column < width
    w_ptr = weight_ptr + slot.to(tl.int64) * weight_stride_slot
    local = tl.arange(0, BLOCK_O)

    sum_MD = tl.zeros((BLOCK_M, BLOCK_D), dtype=ACCUMULATE)
    for start in range(0, num_outputs, BLOCK_O):
        out = start + local
        is_here = is_row[:, None]
        is_weight = is_column[None, :]
        if not EVEN_O:
            is_here = is_here & (out[None, :] < num_outputs)
            is_weight = is_weight & (out[:, None] < num_outputs)
        g_MO = tl.load(row_ptr[:, None] + out[None, :], mask=is_here, other=0).to(COMPUTE)
        out_row = memory_row(out, num_outputs // 2, HALVES).to(tl.int64)
        offset_OD = out_row[:, None] * weight_stride_out + column[None, :] * weight_stride_in
        w_OD = tl.load(w_ptr + offset_OD, mask=is_weight, other=0).to(COMPUTE)
        sum_MD = tl.dot(g_MO, w_OD, sum_MD, input_precision=PRECISION, out_dtype=ACCUMULATE)

    grad_x = sum_MD.to(grad_x_ptr.dtype.element_ty)
    at_MD = place[:, None] * width + column[None, :]
    tl.store(grad_x_ptr + at_MD, grad_x, mask=is_row[:, None] & is_column[None, :])


def grad_input(
    grad_pre_NO: Tensor,
    groups: Groups,
    tiles: TileMap,
    weight_COD: Tensor,
    grad_x_ND: Tensor,
    *,
    is_halves: bool,
    tile: Tile,
    run: Run,
) -> None:
    """Write every computed row's gradient with respect to its token; other rows stay as they are.

    Args:
        grad_pre_NO: gradient at the up projection's outputs, in pair order, contiguous.
        groups, tiles: routing metadata.
        weight_COD: the up projection seen as [C, O, D].
        grad_x_ND: receives the gradients.
        is_halves: whether gates lie before ups in memory.
        tile: tile sizes.
        run: what to do with the launch.
    """
    num_outputs, width = weight_COD.shape[1:]
    arguments = {
        "grad_pre_ptr": grad_pre_NO,
        "offset_ptr": groups.offset_C1,
        "tile_slot_ptr": tiles.slot_I,
        "tile_start_ptr": tiles.start_I,
        "weight_ptr": weight_COD,
        "grad_x_ptr": grad_x_ND,
        "num_tiles": len(tiles.slot_I),
        "num_outputs": num_outputs,
        "width": width,
        "weight_stride_slot": weight_COD.stride(0),
        "weight_stride_out": weight_COD.stride(1),
        "weight_stride_in": weight_COD.stride(2),
        "HALVES": is_halves,
        "BLOCK_M": tiles.block_m,
        "BLOCK_D": tile.block_n,
        "BLOCK_O": tile.block_k,
        "EVEN_O": num_outputs % tile.block_k == 0,
        **arithmetic(grad_pre_NO.dtype),
    }
    grid = (len(tiles.slot_I) * triton.cdiv(width, tile.block_n),)
    run(Launch(grad_input_kernel, grid, arguments, tile.num_warps, tile.num_stages))
