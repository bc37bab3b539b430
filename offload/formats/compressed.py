"""One expert whose matrices are compressed: a record of bytes, and where each matrix begins in it.

First come heads and segments of all matrices, each at the same place for every expert; then the exponents that have no
code, whose number differs from expert to expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import torch

from ..checkpoint.experts import ExpertLayer
from ..checkpoint.tensors import TensorEntry
from .compression import BLOCK_ROWS, GUARD_BYTES, CompressedShape, can_compress, compress, others_end
from .plain import BLOCK_BYTES, Extent, Region


def can_compress_layer(layer: ExpertLayer) -> bool:
    """Whether all matrices of a layer's experts are of a kind that can be compressed."""
    return all(can_compress(parameter.shape, parameter.dtype) for parameter in layer.parameters)


def compress_expert(layer: ExpertLayer, views: Mapping[str, torch.Tensor]) -> list[bytes]:
    """The parts of one expert's record, to be joined.

    Args:
        views: its matrices by name.
    """
    places, others_at = _places(layer), compressed_bounds(layer)[0]
    wholes, others = [], []
    for parameter in layer.parameters:
        whole, rest = compress(views[parameter.name], others_at - places[parameter.name])
        wholes.append(whole.numpy().tobytes())
        others.append(rest.numpy().tobytes())
        others_at += len(rest)
    return wholes + others


def compressed_bounds(layer: ExpertLayer) -> tuple[int, int]:
    """The fewest and the most bytes that a compressed expert of this layer can have."""
    shapes = _shapes(layer).values()
    least = sum(shape.others_at for shape in shapes)
    return least, least + sum(shape.rows * shape.columns for shape in shapes)


@dataclass(frozen=True, eq=False)
class CompressedRecord:
    """The slot layout of one layer's compressed experts; what ExpertRecord is for plain ones.

    Args:
        layer: shapes of the matrices.
        entry_E: where each expert's record is.
    """

    layer: ExpertLayer
    entry_E: tuple[TensorEntry, ...]
    is_straight = True
    is_shiftable = True
    is_compressed = True

    @property
    def files(self) -> set[Path]:
        return {entry.file for entry in self.entry_E}

    def file_of(self, expert: int) -> Path:
        return self.entry_E[expert].file

    def offset_of(self, expert: int) -> int:
        return self.entry_E[expert].offset

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        return (Region(0, max(entry.nbytes for entry in self.entry_E)),)

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of a slot, a multiple of the block size."""
        return -(-self.regions[0].nbytes // BLOCK_BYTES) * BLOCK_BYTES

    @cached_property
    def guard_bytes(self) -> int:
        """What reading may touch after the last slot, however wrong the codes of a record are."""
        return GUARD_BYTES + BLOCK_ROWS * max(shape.columns for shape in _shapes(self.layer).values())

    def shifts(self, extents: list[Extent]) -> tuple[int, ...]:
        """Records begin with a block of the file, so none."""
        return (0,)

    def stored_bytes(self, expert: int) -> int:
        return self.entry_E[expert].nbytes

    def extents(self, expert: int) -> list[Extent]:
        """What to read for one expert."""
        entry = self.entry_E[expert]
        return [Extent(entry, entry.offset, entry.nbytes, 0, 0)]

    def views(self, slot: torch.Tensor, shifts: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Each compressed matrix of the expert in `slot`, from its first head on (uint8, to the end of the slot)."""
        return {name: slot[shifts[0] + place :] for name, place in self._places.items()}

    def check(self, expert: int, slot: torch.Tensor) -> None:
        """Refuse heads that point outside the record.

        Raises:
            OSError: if one does.
        """
        shapes = _shapes(self.layer)
        for name, view in self.views(slot, (0,)).items():
            end = others_end(view, shapes[name]) + self._places[name]
            if end > self.stored_bytes(expert):
                raise OSError(
                    f"{self.file_of(expert)}: expert {expert} points to byte {end}; make it again with `expertier pack`"
                )

    @cached_property
    def _places(self) -> dict[str, int]:
        return _places(self.layer)


def _shapes(layer: ExpertLayer) -> dict[str, CompressedShape]:
    return {parameter.name: CompressedShape(*parameter.shape) for parameter in layer.parameters}


def _places(layer: ExpertLayer) -> dict[str, int]:
    """Where each matrix begins in the record."""
    shapes = _shapes(layer)
    starts = accumulate((shape.others_at for shape in shapes.values()), initial=0)
    return dict(zip(shapes, starts, strict=False))
