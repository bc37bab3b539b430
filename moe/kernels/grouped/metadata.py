"""Routing metadata: which rows belong to which expert, without a sort, an atomic or a synchronisation.

A counting sort in three launches: per block of routed rows a histogram (`histogram_kernel`), a running sum over
blocks (`prefix_kernel`), then each row's place among its expert's rows (`group_kernel`), which keeps the order of
tokens. The same launch writes the tile map: which expert and which rows each tile of the matrix products works on.
An expert id goes through `slot_E` when there is one (expert -> cache slot), so everything after this file knows only
slots; ids >= E and experts without a slot (-1) form one last group of padding rows, which no kernel computes.

Shapes: T tokens, K experts per token, N = T * K routed rows, E experts, C slots (C = E without `slot_E`), Q tiles.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..launching.launch import Launch, Run
from .metadata_kernels import group_kernel, histogram_kernel, prefix_kernel, tile_map_kernel

# routed rows that one program of the counting sort takes: it compares all pairs, which fills the registers of 8 warps
ROWS_PER_BLOCK = 128
# tiles that one program maps, and counts that one step of the running sum adds; only compiled, not timed on a GPU yet
TILES_PER_PROGRAM = 64
BLOCKS_PER_STEP = 1024


@dataclass(frozen=True, eq=False)
class TileMap:
    """Tiles of at most `block_m` rows of one slot each.

    Args:
        slot_Q: slot of each tile; then `PADDING` for tiles of padding rows, and `UNUSED` up to the end (the length is
            an upper bound, so that it need not be asked of the device).
        start_Q: the first row of each tile, in grouped order.
        block_m: rows per tile, a power of two from 16 on.
    """

    slot_Q: Tensor
    start_Q: Tensor
    block_m: int

    def arguments(self, groups: "Groups") -> dict:
        """The kernel arguments of a product over these tiles, by parameter name."""
        return {
            "offset_ptr": groups.offset_C1,
            "tile_slot_ptr": self.slot_Q,
            "tile_start_ptr": self.start_Q,
            "num_tiles": len(self.slot_Q),
            "BLOCK_M": self.block_m,
        }


@dataclass(frozen=True, eq=False)
class Groups:
    """Routed rows in grouped order: by slot, then by token.

    Args:
        order_N: the routed row (`token * K + k`) at each place of the grouped order; padding rows come last.
        position_N: the place of each routed row, -1 for padding rows.
        total_C1: rows of each slot; the last entry is not used.
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


def slot_arguments(expert_TK: Tensor, slot_E: Tensor | None, num_experts: int, num_slots: int) -> dict:
    """The kernel arguments by which a routed row's slot is found, by parameter name; see `group_rows`."""
    return {
        "expert_ptr": expert_TK,
        "slot_ptr": slot_E,
        "num_rows": expert_TK.numel(),
        "num_experts": num_experts,
        "num_slots": num_slots,
        "HAS_SLOTS": slot_E is not None,
    }


def group_rows(
    expert_TK: Tensor, slot_E: Tensor | None, num_experts: int, num_slots: int, block_m: int, run: Run
) -> tuple[Groups, TileMap]:
    """Group routed rows by slot.

    Args:
        expert_TK: expert ids, contiguous, int32 or int64; ids outside 0..num_experts-1 are empty.
        slot_E: int32 slot of each expert, -1 for experts that are not there; None when slots are experts.
        num_experts: E; ids from here on are padding.
        num_slots: C; equal to E without `slot_E`.
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
        **slot_arguments(expert_TK, slot_E, num_experts, num_slots),
        "count_ptr": count_CB,
        "num_blocks": num_blocks,
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
        **tiles.arguments(groups),
        "total_ptr": groups.total_C1,
        "num_rows": len(groups.order_N),
        "num_slots": groups.num_slots,
        "BINS": triton.next_power_of_2(groups.num_slots + 1),
        "TILES": TILES_PER_PROGRAM,
    }
