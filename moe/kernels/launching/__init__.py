"""How a kernel is launched: tile sizes, grids, shared memory."""
