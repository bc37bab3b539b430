"""A file of feed-forwards by units: what a unit needs lies in one piece, and the bounds of the gates at the end.

The file: a magic, the length of a header, the header in JSON (see `Header`), then layer by layer F records of
`unit_bytes`, then layer by layer the arrays of its GateBounds. Each record is a row of the gate, of the other matrix
before the activation if there is one, and a column of the matrix after it.

Shapes: F hidden units, D model width, W numbers of a unit, n units.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from xxhash import xxh3_64_hexdigest

from routing.ground.files import atomic_write

from ..checkpoint.tensors import TensorEntry
from .bounds import GateBounds
from .feed_forwards import FeedForward

MAGIC = b"XPUNITS1"
MOST_HEADER = 64 << 20
"""Bytes of a header that is taken for one: a thousand feed-forwards take half a megabyte."""
STAMP_BYTES = 1 << 16
"""Of each tensor's beginning: another checkpoint of the same shapes differs there."""
RUN_BYTES = 1 << 20
"""One read is at most this long, so that several threads share a long run of units. Not tuned."""


class HeaderLayer(BaseModel):
    """One feed-forward."""

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
    """One feed-forward in a bundle.

    Args:
        of: the same in the model.
        offset: where its units begin.
        bounds_offset: where the arrays of its bounds begin.
    """

    of: FeedForward
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
        """Of the largest feed-forward: a long prompt needs all of its units at once."""
        return max(layer.of.nbytes for layer in self.layers)

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


def _bounds_bytes(of: FeedForward) -> int:
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
    out: Path, feed_forwards: Sequence[FeedForward], progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write the units of a model, a feed-forward at a time, and the bounds of its gates.

    Args:
        out: the file; it appears when it is whole.
        feed_forwards: of the model, with the places of their weights.
        progress: told how many are done, and how many there are.
    """
    header = Header(layers=tuple(_header_layer(each) for each in feed_forwards))
    text = header.model_dump_json().encode()
    total = 2 * len(feed_forwards)
    with atomic_write(out, "wb") as file:
        file.write(MAGIC + len(text).to_bytes(8, "little") + text)
        for done, each in enumerate(feed_forwards, 1):
            *rows, down_DF = (_tensor(entry) for entry in each.entries)
            unit_FW = torch.cat([*rows, down_DF.t()], dim=1).contiguous()
            file.write(memoryview(unit_FW.view(torch.uint8).numpy()).cast("B"))
            progress(done, total)
        for done, each in enumerate(feed_forwards, 1):
            bounds = GateBounds.of(_tensor(each.entries[0]))
            code = memoryview(bounds.code_FD.contiguous().numpy()).cast("B")
            file.write(code)
            file.write(bytes(-len(code) % 4))
            for array_F in (bounds.scale_F, bounds.length_F, bounds.rest_F):
                file.write(memoryview(array_F.contiguous().numpy()).cast("B"))
            progress(len(feed_forwards) + done, total)


def read_bundle(file: Path, feed_forwards: Sequence[FeedForward]) -> Bundle:
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
    if header != Header(layers=tuple(_header_layer(each) for each in feed_forwards)):
        raise ValueError(f"bundle {file}: it is of another model, or of another state of this one; pack it again")
    start = len(MAGIC) + 8 + length
    bounds = start + sum(each.nbytes for each in feed_forwards)
    layers = []
    for each in feed_forwards:
        layers.append(BundledLayer(each, start, bounds))
        start, bounds = start + each.nbytes, bounds + _bounds_bytes(each)
    if file.stat().st_size != bounds:
        raise ValueError(f"bundle {file}: {file.stat().st_size} bytes; {bounds} were expected")
    return Bundle(file, tuple(layers))


def _header_layer(each: FeedForward) -> HeaderLayer:
    return HeaderLayer(
        name=each.name,
        parts=each.parts,
        num_units=each.num_units,
        width=each.width,
        dtype=str(each.dtype),
        stamps=tuple(_stamp(entry) for entry in each.entries),
    )


def _stamp(entry: TensorEntry) -> str:
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        return str(xxh3_64_hexdigest(file.read(min(STAMP_BYTES, entry.nbytes))))


def _tensor(entry: TensorEntry) -> torch.Tensor:
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        data = bytearray(file.read(entry.nbytes))
    if len(data) != entry.nbytes:
        raise OSError(f"{entry.file} ends within {entry.name}")
    return torch.frombuffer(data, dtype=entry.torch_dtype()).view(entry.shape)


class BundleReader:
    """Reads units by several threads, neighbours in one piece, through the page cache.

    Args:
        bundle: where each feed-forward's units are; its file stays open until `close`.
        num_threads: reads in flight at most.
    """

    def __init__(self, bundle: Bundle, num_threads: int) -> None:
        self._file = bundle.file
        self._descriptor: int | None = os.open(bundle.file, os.O_RDONLY)
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="expertier-units")
        self.bytes_read = 0
        self.turn = 0
        """Counts calls of feed-forwards, which share the memory that is read into."""

    def close(self) -> None:
        """Stop the threads and close the file."""
        self._threads.shutdown()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def read(
        self, layer: BundledLayer, unit_m: NDArray[np.int64], place_m: NDArray[np.int64], target_nW: torch.Tensor
    ) -> None:
        """Read units into rows of a target, and wait for them.

        Args:
            layer: whose units.
            unit_m, place_m: numbers of units and of rows, both rising.
            target_nW: contiguous.

        Raises:
            OSError: if the file is shorter than it was, or the disk fails.
            RuntimeError: if the reader is closed.
        """
        if self._descriptor is None:
            raise RuntimeError("this model was closed; load it again")
        if not len(unit_m):
            return
        memory = memoryview(target_nW.view(torch.uint8).numpy()).cast("B")
        jobs = [
            self._threads.submit(self._run, layer, first, memory[place : place + nbytes])
            for first, place, nbytes in _runs(unit_m, place_m, layer.of.unit_bytes)
        ]
        for job in jobs:
            job.result()
        self.bytes_read += len(unit_m) * layer.of.unit_bytes

    def _run(self, layer: BundledLayer, first: int, target: memoryview) -> None:
        assert self._descriptor is not None
        offset = layer.offset + first * layer.of.unit_bytes
        done = os.preadv(self._descriptor, [target], offset)
        while 0 < done < len(target):
            more = os.preadv(self._descriptor, [target[done:]], offset + done)
            done = done + more if more else -1
        if done != len(target):
            raise OSError(f"{self._file} ends within the units of {layer.of.name}; it was changed while it was open")


def _runs(unit_m: NDArray[np.int64], place_m: NDArray[np.int64], unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """First unit, place in the target and length in bytes of each piece whose units and places are neighbours."""
    breaks = np.flatnonzero((np.diff(unit_m) != 1) | (np.diff(place_m) != 1)) + 1
    most = max(RUN_BYTES // unit_bytes, 1)
    for start, stop in zip([0, *breaks], [*breaks, len(unit_m)], strict=True):
        for piece in range(start, stop, most):
            count = min(most, stop - piece)
            yield int(unit_m[piece]), int(place_m[piece]) * unit_bytes, count * unit_bytes
