"""How programs of a grouped matrix product are laid over tiles of rows and blocks of columns."""

import triton
import triton.language as tl

# row tiles that visit a block of columns together, so that its weights are read from L2 and not from memory; more let
# the tiles' own rows leave L2. 8 as in Triton's tutorial on matrix products; not tried on a GPU yet
TILES_TOGETHER = tl.constexpr(8)


@triton.jit
def tile_and_block(num_tiles, num_column_blocks):
    """The row tile and the column block of this program: column by column within a few row tiles."""
    program = tl.program_id(0)
    programs_together = TILES_TOGETHER * num_column_blocks
    first_tile = (program // programs_together) * TILES_TOGETHER
    tiles_here = tl.minimum(num_tiles - first_tile, TILES_TOGETHER)
    within = program % programs_together
    return first_tile + within % tiles_here, within // tiles_here
