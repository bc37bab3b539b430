"""A file of feed-forwards by units: what a unit needs lies in one piece, and the bounds of the gates at the end.

The file: a magic, the length of a header, the header in JSON (see `Header`), then layer by layer F records of
`unit_bytes`, then layer by layer the arrays of its GateBounds. Each record is a row of the gate, of the other matrix
before the activation if there is one, and a column of the matrix after it. Experts of a layer follow each other.

Shapes: F hidden units of a layer, D model width, W numbers of a unit, n units.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from routing.ground.files import atomic_write

from .bounds import GateBounds
from .unit_layer import UnitLayer

MAGIC = b"XPUNITS1"
MOST_HEADER = 64 << 20
"""Bytes of a header that is taken for one: a thousand feed-forwards take half a megabyte."""


class HeaderLayer(BaseModel):
    """One feed-forward, or the experts of one layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str
    parts: tuple[str, ...]
    num_units: int = Field(gt=0, lt=1 << 32)
    width: int = Field(gt=0, lt=1 << 32)
    dtype: str
    stamps: tuple[str, ...]


class Header(BaseModel):
    """What a bundle holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    layers: tuple[HeaderLayer, ...]


@dataclass(frozen=True, eq=False)
class BundledLayer:
    """One feed-forward, or the experts of one layer, in a bundle.

    Args:
        of: the same in the model.
        offset: where its units begin.
        bounds_offset: where the arrays of its bounds begin.
    """

    of: UnitLayer
    offset: int
    bounds_offset: int

    @property
    def num_units(self) -> int:
        return self.of.num_units


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle that fits a model."""

    file: Path
    layers: tuple[BundledLayer, ...]

    @property
    def weight_names(self) -> frozenset[str]:
        """Full names of the parameters that it stands for."""
        return frozenset().union(*(layer.of.weight_names for layer in self.layers))

    @property
    def nbytes(self) -> int:
        """Of all units."""
        return sum(layer.of.nbytes for layer in self.layers)

    @property
    def bounds_bytes(self) -> int:
        """Of all bounds."""
        return sum(_bounds_bytes(layer.of) for layer in self.layers)

    @property
    def work_bytes(self) -> int:
        """Of what one call has in memory: a long prompt needs all units of a feed-forward at once."""
        return max(layer.of.rows_at_once * layer.of.unit_bytes for layer in self.layers)

    def bounds(self, layer: BundledLayer) -> GateBounds:
        """The bounds of one gate."""
        F, D = layer.of.num_units, layer.of.width
        with self.file.open("rb") as file:
            file.seek(layer.bounds_offset)
            data = bytearray(file.read(_bounds_bytes(layer.of)))
        if len(data) != _bounds_bytes(layer.of):
            raise OSError(f"{self.file} ends within the bounds of {layer.of.name}")
        code_FD = torch.frombuffer(data, dtype=torch.int8, count=F * D).view(F, D)
        floats_3F = torch.frombuffer(data, dtype=torch.float32, offset=F * D + (-F * D) % 4).view(3, F)
        return GateBounds(code_FD, *floats_3F)


def _bounds_bytes(of: UnitLayer) -> int:
    codes = of.num_units * of.width
    return codes + (-codes) % 4 + 3 * 4 * of.num_units


def is_bundle(file: Path) -> bool:
    """Whether a file begins as a bundle does."""
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(len(MAGIC)) == MAGIC


def expect_replaceable(out: Path) -> None:
    """Refuse to write over a file that is no bundle.

    Raises:
        ValueError: if it is something else.
    """
    if out.exists() and not is_bundle(out):
        raise ValueError(f"{out} is there and no bundle; remove it, or give another --out")


def write_bundle(
    out: Path, layers: Sequence[UnitLayer], progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write the units of a model and the bounds of its gates, a feed-forward at a time.

    Args:
        out: the file; it appears when it is whole.
        layers: of the model, with the places of their weights.
        progress: told how many units are done, and how many there are.
    """
    text = _header(layers).model_dump_json().encode()
    head = MAGIC + len(text).to_bytes(8, "little") + text
    done, total = 0, sum(each.num_units for each in layers)
    with atomic_write(out, "wb") as file:
        file.write(head)
        for layer in _places(layers, len(head))[0]:
            for count in _write_layer(file, layer):
                done += count
                progress(done, total)


def _write_layer(file: BinaryIO, layer: BundledLayer) -> Iterator[int]:
    """Write units and codes where they belong, a feed-forward at a time; gives how many units each had."""
    units_at, codes_at, floats = layer.offset, layer.bounds_offset, []
    for *rows, down_DF in layer.of.matrices():
        bounds = GateBounds.of(rows[0])
        units_at = _write_at(file, units_at, torch.cat([*rows, down_DF.t()], dim=1))
        codes_at = _write_at(file, codes_at, bounds.code_FD)
        floats.append(torch.stack([bounds.scale_F, bounds.length_F, bounds.rest_F]))
        yield len(bounds.scale_F)
    codes = layer.of.num_units * layer.of.width
    _write_at(file, codes_at + (-codes) % 4, torch.cat(floats, dim=1))


def _write_at(file: BinaryIO, offset: int, numbers: torch.Tensor) -> int:
    """Write numbers; gives where they end."""
    file.seek(offset)
    file.write(memoryview(numbers.contiguous().view(torch.uint8).numpy()).cast("B"))
    return offset + numbers.nbytes


def read_bundle(file: Path, layers: Sequence[UnitLayer]) -> Bundle:
    """A bundle, checked against the model that it shall belong to.

    Raises:
        ValueError: if it is damaged, or of another model.
    """
    with file.open("rb") as opened:
        opened.seek(len(MAGIC))
        length = int.from_bytes(opened.read(8), "little")
        if not 0 < length <= MOST_HEADER:
            raise ValueError(f"bundle {file}: a header of {length} bytes; the file is damaged")
        text = opened.read(length)
    try:
        header = Header.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"bundle {file}: damaged header ({error.errors()[0]['msg']})") from error
    if header != _header(layers):
        raise ValueError(f"bundle {file}: it is of another model, or of another state of this one; pack it again")
    places, end = _places(layers, len(MAGIC) + 8 + length)
    if file.stat().st_size != end:
        raise ValueError(f"bundle {file}: {file.stat().st_size} bytes; {end} were expected")
    return Bundle(file, places)


def _places(layers: Sequence[UnitLayer], start: int) -> tuple[tuple[BundledLayer, ...], int]:
    """Where each layer is in a file whose header ends at `start`, and where the file ends."""
    bounds = start + sum(each.nbytes for each in layers)
    places = []
    for each in layers:
        places.append(BundledLayer(each, start, bounds))
        start, bounds = start + each.nbytes, bounds + _bounds_bytes(each)
    return tuple(places), bounds


def _header(layers: Sequence[UnitLayer]) -> Header:
    return Header(layers=tuple(_header_layer(each) for each in layers))


def _header_layer(each: UnitLayer) -> HeaderLayer:
    return HeaderLayer(
        name=each.name,
        parts=each.parts,
        num_units=each.num_units,
        width=each.width,
        dtype=str(each.dtype),
        stamps=each.stamps(),
    )
