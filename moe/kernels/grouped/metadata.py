"""Routing metadata: which rows belong to which expert, without a sort, an atomic or a synchronisation.

A counting sort in three launches: per block of routed rows a histogram (`histogram_kernel`), a running sum over
blocks (`prefix_kernel`), then each row's place among its expert's rows (`group_kernel`), which keeps the order of
tokens. The same launch writes the tile map: which expert and which rows each tile of the matrix products works on.
An expert id goes through `slot_E` when there is one (expert -> cache slot), so everything after this file knows only
slots; ids >= E and experts without a slot (-1) form one last group that nobody computes.

Shapes: T tokens, K experts per token, N = T * K routed rows, E experts, C slots (C = E without `slot_E`), Q tiles.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launching.launch import Launch, Run

ROWS_PER_BLOCK = 128
TILES_PER_PROGRAM = 64
# what stands in a tile map in place of a slot
NOBODY = tl.constexpr(-2)
UNUSED = tl.constexpr(-1)
BLOCKS_PER_STEP = 1024


@triton.jit
def slot_of(expert_ptr, slot_ptr, row, is_row, num_experts, num_slots, HAS_SLOTS: tl.constexpr):
    """The slot of each routed row; `num_slots` for rows that nobody computes."""
    expert = tl.load(expert_ptr + row, mask=is_row, other=num_experts).to(tl.int32)
    is_ours = (expert >= 0) & (expert < num_experts)
    if HAS_SLOTS:
        slot = tl.load(slot_ptr + expert, mask=is_ours, other=-1)
        return tl.where((slot >= 0) & (slot < num_slots), slot, num_slots)
    else:
        return tl.where(is_ours, expert, num_slots)


@triton.jit
def histogram_kernel(
    expert_ptr,
    slot_ptr,
    count_ptr,
    num_rows,
    num_blocks,
    num_experts,
    num_slots,
    HAS_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """Count the rows of each slot in one block of routed rows; counts are kept slot-major."""
    block = tl.program_id(0)
    row = block * BLOCK + tl.arange(0, BLOCK)
    slot = slot_of(expert_ptr, slot_ptr, row, row < num_rows, num_experts, num_slots, HAS_SLOTS)
    # rows past the end land in the bin of nobody's rows; `group_kernel` masks them
    count = tl.histogram(slot, BINS)
    bins = tl.arange(0, BINS)
    tl.store(count_ptr + bins.to(tl.int64) * num_blocks + block, count, mask=bins <= num_slots)


@triton.jit
def prefix_kernel(count_ptr, total_ptr, num_blocks, BLOCK: tl.constexpr):
    """Turn one slot's counts per block into the rows before each block, and write their total."""
    slot = tl.program_id(0)
    row_ptr = count_ptr + slot.to(tl.int64) * num_blocks
    seen = tl.zeros((), dtype=tl.int32)
    for start in range(0, num_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        count = tl.load(row_ptr + block, mask=block < num_blocks, other=0)
        before = tl.cumsum(count, 0) - count
        tl.store(row_ptr + block, seen + before, mask=block < num_blocks)
        seen += tl.sum(count, 0)
    tl.store(total_ptr + slot, seen)


@triton.jit
def write_tile_map(
    program,
    total_ptr,
    offset_ptr,
    tile_slot_ptr,
    tile_start_ptr,
    num_rows,
    num_tiles,
    num_slots,
    BLOCK_M: tl.constexpr,
    BINS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Write the slot and the first row of `TILES` tiles, those of nobody's rows and unused ones included."""
    bins = tl.arange(0, BINS)
    total = tl.load(total_ptr + bins, mask=bins < num_slots, other=0)
    total = tl.where(bins == num_slots, num_rows - tl.sum(total, 0), total)
    row_end = tl.cumsum(total, 0)
    tiles = (total + BLOCK_M - 1) // BLOCK_M
    tile_end = tl.cumsum(tiles, 0)
    if program == 0:
        tl.store(offset_ptr + bins, row_end - total, mask=bins <= num_slots)

    tile = program * TILES + tl.arange(0, TILES)
    owner = tl.sum((tile_end[None, :] <= tile[:, None]).to(tl.int32), 1)
    is_owner = owner[:, None] == bins[None, :]
    first_tile = tl.sum(tl.where(is_owner, (tile_end - tiles)[None, :], 0), 1)
    first_row = tl.sum(tl.where(is_owner, (row_end - total)[None, :], 0), 1)
    slot = tl.where(owner < num_slots, owner, tl.where(owner == num_slots, NOBODY, UNUSED))
    tl.store(tile_slot_ptr + tile, slot, mask=tile < num_tiles)
    tl.store(tile_start_ptr + tile, first_row + (tile - first_tile) * BLOCK_M, mask=tile < num_tiles)


@triton.jit
def group_kernel(
    expert_ptr,
    slot_ptr,
    count_ptr,
    total_ptr,
    order_ptr,
    position_ptr,
    offset_ptr,
    tile_slot_ptr,
    tile_start_ptr,
    num_rows,
    num_blocks,
    num_tiles,
    num_experts,
    num_slots,
    HAS_SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BINS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Place one block of routed rows behind the rows of the same slot in earlier blocks; further programs map tiles."""
    program = tl.program_id(0)
    if program >= num_blocks:
        write_tile_map(
            program - num_blocks,
            total_ptr,
            offset_ptr,
            tile_slot_ptr,
            tile_start_ptr,
            num_rows,
            num_tiles,
            num_slots,
            BLOCK_M,
            BINS,
            TILES,
        )
    else:
        local = tl.arange(0, BLOCK)
        row = program * BLOCK + local
        is_row = row < num_rows
        slot = slot_of(expert_ptr, slot_ptr, row, is_row, num_experts, num_slots, HAS_SLOTS)
        is_twin_before = (slot[:, None] == slot[None, :]) & (local[None, :] < local[:, None])
        rank = tl.sum(is_twin_before.to(tl.int32), 1)
        bins = tl.arange(0, BINS)
        total = tl.load(total_ptr + bins, mask=bins <= num_slots, other=0)
        start = tl.sum(tl.where(bins[None, :] < slot[:, None], total[None, :], 0), 1)
        before = tl.load(count_ptr + slot.to(tl.int64) * num_blocks + program)
        position = start + before + rank
        tl.store(order_ptr + position, row, mask=is_row)
        tl.store(position_ptr + row, tl.where(slot < num_slots, position, -1), mask=is_row)


@triton.jit
def tile_map_kernel(
    total_ptr,
    offset_ptr,
    tile_slot_ptr,
    tile_start_ptr,
    num_rows,
    num_tiles,
    num_slots,
    BLOCK_M: tl.constexpr,
    BINS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The tile map alone, for the backward pass, which may use other tiles than the forward pass."""
    write_tile_map(
        tl.program_id(0),
        total_ptr,
        offset_ptr,
        tile_slot_ptr,
        tile_start_ptr,
        num_rows,
        num_tiles,
        num_slots,
        BLOCK_M,
        BINS,
        TILES,
    )


@dataclass(frozen=True, eq=False)
class TileMap:
    """Tiles of at most `block_m` rows of one slot each.

    Args:
        slot_Q: slot of each tile; then `NOBODY` for tiles of nobody's rows, and `UNUSED` up to the end (the length is
            an upper bound, so that it need not be asked of the device).
        start_Q: the first row of each tile, in grouped order.
        block_m: rows per tile.
    """

    slot_Q: Tensor
    start_Q: Tensor
    block_m: int


@dataclass(frozen=True, eq=False)
class Groups:
    """Routed rows in grouped order: by slot, then by token.

    Args:
        order_N: the routed row (`token * K + k`) at each place of the grouped order; nobody's rows come last.
        position_N: the place of each routed row, -1 for nobody's rows.
        total_C1: rows of each slot; the last entry is of use to nobody.
        offset_C1: the first place of each slot, and at the end the number of rows that are computed.
    """

    order_N: Tensor
    position_N: Tensor
    total_C1: Tensor
    offset_C1: Tensor

    @property
    def num_slots(self) -> int:
        """C."""
        return self.offset_C1.shape[0] - 1


def group_rows(
    expert_TK: Tensor, slot_E: Tensor | None, num_experts: int, num_slots: int, block_m: int, run: Run
) -> tuple[Groups, TileMap]:
    """Group routed rows by slot.

    Args:
        expert_TK: expert ids, contiguous, int32 or int64; ids outside 0..num_experts-1 are empty.
        slot_E: int32 slot of each expert, -1 for experts that are not there; None when slots are experts.
        num_experts: E.
        num_slots: C.
        block_m: rows per tile of the tile map.
        run: what to do with the launches.

    Returns:
        The groups and the tile map.
    """
    num_rows = expert_TK.numel()
    num_blocks = triton.cdiv(num_rows, ROWS_PER_BLOCK)
    bins = triton.next_power_of_2(num_slots + 1)

    def integers(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=expert_TK.device)

    count_CB = integers(num_slots + 1, num_blocks)
    groups = Groups(integers(num_rows), integers(num_rows), integers(num_slots + 1), integers(num_slots + 1))
    tiles = _empty_tile_map(groups, block_m)
    routed = {
        "expert_ptr": expert_TK,
        "slot_ptr": slot_E,
        "count_ptr": count_CB,
        "num_rows": num_rows,
        "num_blocks": num_blocks,
        "num_experts": num_experts,
        "num_slots": num_slots,
        "HAS_SLOTS": slot_E is not None,
        "BLOCK": ROWS_PER_BLOCK,
        "BINS": bins,
    }
    run(Launch(histogram_kernel, (num_blocks,), routed))
    run(
        Launch(
            prefix_kernel,
            (num_slots + 1,),
            {"count_ptr": count_CB, "total_ptr": groups.total_C1, "num_blocks": num_blocks, "BLOCK": BLOCKS_PER_STEP},
        )
    )
    mapped = _tile_map_arguments(groups, tiles)
    grid = (num_blocks + triton.cdiv(len(tiles.slot_Q), TILES_PER_PROGRAM),)
    grouped = {"order_ptr": groups.order_N, "position_ptr": groups.position_N}
    # with 4 warps the comparison of all pairs of a block does not fit in registers
    run(Launch(group_kernel, grid, routed | mapped | grouped, num_warps=8))
    return groups, tiles


def map_tiles(groups: Groups, block_m: int, run: Run) -> TileMap:
    """The tile map of `groups` for tiles of `block_m` rows."""
    tiles = _empty_tile_map(groups, block_m)
    grid = (triton.cdiv(len(tiles.slot_Q), TILES_PER_PROGRAM),)
    run(Launch(tile_map_kernel, grid, _tile_map_arguments(groups, tiles)))
    return tiles


def _empty_tile_map(groups: Groups, block_m: int) -> TileMap:
    num_rows = len(groups.order_N)
    num_tiles = triton.cdiv(num_rows, block_m) + min(groups.num_slots + 1, num_rows)
    slot_Q = torch.empty(num_tiles, dtype=torch.int32, device=groups.order_N.device)
    return TileMap(slot_Q, torch.empty_like(slot_Q), block_m)


def _tile_map_arguments(groups: Groups, tiles: TileMap) -> dict:
    return {
        "total_ptr": groups.total_C1,
        "offset_ptr": groups.offset_C1,
        "tile_slot_ptr": tiles.slot_Q,
        "tile_start_ptr": tiles.start_Q,
        "num_rows": len(groups.order_N),
        "num_tiles": len(tiles.slot_Q),
        "num_slots": groups.num_slots,
        "BLOCK_M": tiles.block_m,
        "BINS": triton.next_power_of_2(groups.num_slots + 1),
        "TILES": TILES_PER_PROGRAM,
    }
