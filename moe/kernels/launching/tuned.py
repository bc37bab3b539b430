"""Which tiles a layer uses: those tuned for this device, else the table's.

Nothing is tuned on first use. `tune.py` measures on request and writes the file that `chosen_tiles` reads.
"""

import functools
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..weights.quantise import QuantisedWeight
from .launch import is_interpreted
from .tiles import (
    INTERPRETED,
    ROW_CLASSES,
    LayerTiles,
    Tile,
    architecture,
    number_format,
    row_class,
    table_tiles,
    uniform_tiles,
)

if TYPE_CHECKING:
    from ..weights.weights import ExpertWeights

# a file of tuned tiles has some 500 bytes per layer
MAX_FILE_BYTES = 1 << 20


def chosen_tiles(device: torch.device, dtype: torch.dtype, num_rows: int, weights: "ExpertWeights") -> LayerTiles:
    """The tiles of a layer on this device: those tuned for the most similar layer if there are any, else the table's.

    Args:
        device, dtype: where and in which number format products are computed.
        num_rows: T * K; divided by the number of experts it gives the row class.
        weights: the experts, for their sizes and whether they are quantised.
    """
    if is_interpreted():
        return uniform_tiles(INTERPRETED)
    numbers, rows = number_format(dtype), row_class(num_rows / weights.num_experts)
    if device.type == "cuda":
        tuned = tuned_tiles(torch.cuda.get_device_name(device))
        alike = [key for key in tuned if (key.numbers, key.rows) == (numbers, rows)]
        if alike:
            return tuned[min(alike, key=lambda key: key.distance(weights.width, weights.num_features))]
    return table_tiles(architecture(device), numbers, rows, is_quantised=isinstance(weights.up, QuantisedWeight))


def tuned_file(device_name: str) -> Path:
    """Where tuned tiles of a device are kept: `$XDG_CACHE_HOME/expertier/tiles/<device>.json`.

    Raises:
        ValueError: if neither that variable nor a home folder says where.
    """
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise ValueError("there is no home folder to keep tuned tiles in; set XDG_CACHE_HOME") from error
    return cache / "expertier" / "tiles" / f"{device_name.replace(' ', '_').replace('/', '_')}.json"


@dataclass(frozen=True)
class TunedFor:
    """What tiles were tuned for.

    Args:
        numbers, rows: keys of the table.
        width, features: D and F of the tuned layer, positive.
    """

    numbers: str
    rows: str
    width: int
    features: int

    def __post_init__(self) -> None:
        sizes = (self.width, self.features)
        if self.rows not in ROW_CLASSES or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"rows must be one of {', '.join(ROW_CLASSES)} and sizes positive; got {self}")

    def distance(self, width: int, features: int) -> float:
        """How far another layer is from this one: doublings of D and of F."""
        return abs(math.log2(width / self.width)) + abs(math.log2(features / self.features))


@functools.cache
def tuned_tiles(device_name: str) -> dict[TunedFor, LayerTiles]:
    """Tuned tiles; empty when nothing was tuned on this device.

    Raises:
        ValueError: if the file is not what `tune.save_tuned` writes.
    """
    try:
        path = tuned_file(device_name)
    except ValueError:  # no home folder
        return {}
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ValueError("it is too large")
        return {
            TunedFor(**entry["layer"]): LayerTiles(**{name: Tile(**sizes) for name, sizes in entry["tiles"].items()})
            for entry in json.loads(path.read_text(encoding="utf-8"))
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a file of tuned tiles ({error}); delete it or tune again") from error


def tuned_document(tuned: dict[TunedFor, LayerTiles]) -> list[dict]:
    """What `tuned_tiles` reads, as plain data."""
    return [{"layer": asdict(layer), "tiles": asdict(tiles)} for layer, tiles in tuned.items()]
