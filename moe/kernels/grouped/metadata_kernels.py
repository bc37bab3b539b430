"""Kernels of the routing metadata: counting sort of routed rows by slot, and tile map; launched by `metadata.py`.

Shapes: T tokens, K experts per token, N = T * K routed rows, E experts, C slots (C = E without `slot_E`), Q tiles.
"""

import triton
import triton.language as tl

# what stands in a tile map in place of a slot: tiles of padding rows, and tiles after the last one in use
PADDING = tl.constexpr(-2)
UNUSED = tl.constexpr(-1)


@triton.jit
def slot_of(expert_ptr, slot_ptr, row, is_row, num_experts, num_slots, HAS_SLOTS: tl.constexpr):
    """The slot of each routed row; `num_slots` for padding rows."""
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
    # rows past the end land in the bin of padding rows; `group_kernel` masks them
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
    """Write the slot and the first row of `TILES` tiles, those of padding rows and unused ones included."""
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
    slot = tl.where(owner < num_slots, owner, tl.where(owner == num_slots, PADDING, UNUSED))
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
