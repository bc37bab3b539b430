"""Tile sizes, and a small table of them by architecture, number format and rows per expert; `tuned.py` chooses."""

import functools
from dataclasses import dataclass

import torch

# rows per expert up to which a class applies: three tiles of 16 rows in "few", three of 64 in "some".
# Not tried on a GPU yet, as all tiles below; they follow published configurations, and none spills with Triton 3.9
# (record 2026-11-21_kernels-ahead-of-time)
ROW_CLASSES = {"few": 48, "some": 192, "many": None}


@dataclass(frozen=True)
class Tile:
    """Sizes of one matrix product.

    Args:
        block_m, block_n: rows and columns of the output that one program computes.
        block_k: terms of the sum per step.
        num_warps, num_stages: warps per program, and steps of a loop that are loaded ahead.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        blocks = (self.block_m, self.block_n, self.block_k, self.num_warps)
        is_fit = all(isinstance(size, int) and size > 0 and size & (size - 1) == 0 for size in blocks)
        if not is_fit or min(blocks[:3]) < 16 or not isinstance(self.num_stages, int) or self.num_stages < 1:
            raise ValueError(f"tile sizes must be powers of two, blocks at least 16; got {self}")


@dataclass(frozen=True)
class LayerTiles:
    """Tiles of all matrix products of a layer; products that share a tile map share `block_m`.

    Args:
        up, down: forward; `up.block_n` counts gate and up outputs.
        grad_activation, grad_input: backward over rows, with one `block_m` for both.
        grad_weight: backward over experts; `block_k` counts rows.
    """

    up: Tile
    down: Tile
    grad_activation: Tile
    grad_input: Tile
    grad_weight: Tile

    def __post_init__(self) -> None:
        if self.up.block_m != self.down.block_m or self.grad_activation.block_m != self.grad_input.block_m:
            raise ValueError(
                f"up and down, and grad_activation and grad_input, must have the same block_m; got "
                f"{self.up.block_m}, {self.down.block_m}, {self.grad_activation.block_m}, {self.grad_input.block_m}"
            )


def uniform_tiles(tile: Tile, grad_weight: Tile | None = None, grad_activation: Tile | None = None) -> LayerTiles:
    """One tile for every product, but for those given."""
    return LayerTiles(tile, tile, grad_activation or tile, tile, grad_weight or tile)


# rows, columns, terms of the sum per step, warps, stages
_SM90_WIDE = Tile(128, 256, 64, 8, 4)
_SM90_SQUARE = Tile(128, 128, 64, 8, 3)
_SM90_NARROW = Tile(64, 128, 64, 4, 4)
_SM80_SQUARE = Tile(128, 128, 32, 8, 4)
_SM80_NARROW = Tile(64, 128, 32, 4, 4)
_SM86_SQUARE = Tile(128, 128, 32, 8, 3)
_SM86_NARROW = Tile(64, 64, 32, 4, 3)
_CDNA_SQUARE = Tile(128, 128, 64, 8, 2)
_CDNA_NARROW = Tile(64, 128, 64, 4, 2)
_SINGLE = Tile(64, 64, 32, 4, 2)
_DOUBLE = Tile(32, 32, 16, 4, 1)
INTERPRETED = Tile(16, 32, 32, 4, 1)

# (architecture, number format, row class)
TILES = {
    ("sm90", "half", "few"): uniform_tiles(Tile(16, 128, 64, 4, 4), _SM90_NARROW, Tile(16, 64, 64, 4, 4)),
    ("sm90", "half", "some"): uniform_tiles(_SM90_NARROW, _SM90_SQUARE),
    ("sm90", "half", "many"): uniform_tiles(_SM90_WIDE, _SM90_WIDE, _SM90_WIDE),
    ("sm100", "half", "few"): uniform_tiles(Tile(16, 128, 64, 4, 4), _SM90_NARROW, Tile(16, 64, 64, 4, 4)),
    ("sm100", "half", "some"): uniform_tiles(_SM90_NARROW, _SM90_SQUARE),
    ("sm100", "half", "many"): uniform_tiles(_SM90_WIDE, _SM90_WIDE, _SM90_WIDE),
    ("sm80", "half", "few"): uniform_tiles(Tile(16, 128, 64, 4, 3), _SM80_NARROW, Tile(16, 64, 64, 4, 3)),
    ("sm80", "half", "some"): uniform_tiles(_SM80_NARROW, _SM80_SQUARE),
    ("sm80", "half", "many"): uniform_tiles(_SM80_SQUARE),
    ("sm86", "half", "few"): uniform_tiles(Tile(16, 64, 64, 4, 3), _SM86_NARROW),
    ("sm86", "half", "some"): uniform_tiles(_SM86_NARROW),
    ("sm86", "half", "many"): uniform_tiles(_SM86_SQUARE),
    ("gfx942", "half", "few"): uniform_tiles(Tile(16, 64, 64, 4, 2), _CDNA_NARROW),
    ("gfx942", "half", "some"): uniform_tiles(_CDNA_NARROW, _CDNA_SQUARE),
    ("gfx942", "half", "many"): uniform_tiles(_CDNA_SQUARE),
}
# in place of the above where weights are dequantised: beside 256 columns of sums that does not fit in registers
QUANTISED_TILES = {
    ("sm90", "half", "many"): uniform_tiles(_SM90_SQUARE),
    ("sm100", "half", "many"): uniform_tiles(_SM90_SQUARE),
}
ARCHITECTURES = ("sm80", "sm86", "sm90", "sm100", "gfx942")
FALLBACKS = {"single": uniform_tiles(_SINGLE), "double": uniform_tiles(_DOUBLE)}


@dataclass(frozen=True)
class DecodeTile:
    """Sizes of the products of few tokens, where weights take the place of rows.

    Args:
        block_out: outputs per program; they are the rows of its product.
        block_in: terms of the sum per step.
        num_warps, num_stages: warps per program, and steps of a loop that are loaded ahead.
    """

    block_out: int
    block_in: int
    num_warps: int
    num_stages: int


# outputs, terms of the sum per step, warps, stages; compiled for all targets, not tried on a GPU yet
DECODE_TILES = {
    "half": DecodeTile(64, 128, 4, 4),
    # a quarter of the bytes per tile, so more tiles should be on their way; six stages spill on sm90, four on sm100
    "int4": DecodeTile(64, 128, 4, 5),
    "single": DecodeTile(64, 32, 4, 2),
    "double": DecodeTile(32, 16, 4, 1),
}


def number_format(dtype: torch.dtype) -> str:
    """`half`, `single` or `double`: the key of the tables."""
    return {torch.float64: "double", torch.float32: "single"}.get(dtype, "half")


def row_class(rows_per_expert: float) -> str:
    """`few`, `some` or `many`."""
    return next(name for name, most in ROW_CLASSES.items() if most is None or rows_per_expert <= most)


def table_tiles(arch: str, numbers: str, rows: str, *, is_quantised: bool = False) -> LayerTiles:
    """The table's entry, or what fits everywhere for number formats that are not tabulated."""
    if numbers in FALLBACKS:
        return FALLBACKS[numbers]
    key = arch, numbers, rows
    return QUANTISED_TILES.get(key, TILES[key]) if is_quantised else TILES[key]


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's name for a device; unknown ones get the entry with the least demands."""
    if device.type != "cuda":
        return "sm80"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    return {(8, 0): "sm80", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}.get((major, minor), "sm86")


@functools.cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a device; 1 where nothing runs in parallel."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
