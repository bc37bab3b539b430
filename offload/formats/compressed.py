"""Experts compressed without loss: a record of bytes, and where each matrix begins in it.

First come heads and segments of all matrices, each at the same place for every expert; then the exponents that have no
code, whose number differs from expert to expert. `compression.py` has the form of one matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import ClassVar

import torch

from routing.ground.hardware import Hardware

from ..checkpoint.experts import ExpertLayer
from ..native.kernel_matrix import COMPRESSED, KernelMatrix
from .compression import (
    BLOCK_ROWS,
    GUARD_BYTES,
    CompressedMatrix,
    CompressedShape,
    can_compress,
    compress,
    expand,
    others_end,
)
from .form import MatrixEncoder
from .packed import PackedForm


@dataclass(frozen=True, eq=False)
class CompressedForm(PackedForm):
    """The experts of one layer, compressed."""

    name: ClassVar[str] = CompressedMatrix.name
    linears: ClassVar[MatrixEncoder | None] = CompressedMatrix()
    reaches_gpu: ClassVar[bool] = False
    is_expanded: ClassVar[bool] = True

    @cached_property
    def guard_bytes(self) -> int:
        """What reading may touch after the last slot, however wrong the codes of a record are."""
        return GUARD_BYTES + BLOCK_ROWS * max(shape.columns for shape in _shapes(self.layer).values())

    def views(self, slot: torch.Tensor, shifts: Sequence[int]) -> dict[str, torch.Tensor]:
        """Each compressed matrix from its first head on (uint8), to the end of the slot."""
        return {name: slot[shifts[0] + place :] for name, place in _places(self.layer).items()}

    def can_multiply(self, *, is_transposed: bool) -> bool:
        return not is_transposed

    def kernel_matrices(self, views: Mapping[str, torch.Tensor], expert: int) -> dict[str, tuple[KernelMatrix, ...]]:
        shapes = _shapes(self.layer)
        return {
            name: (KernelMatrix(COMPRESSED, shapes[name].rows, shapes[name].columns, None, view.data_ptr()),)
            for name, view in views.items()
        }

    def check(self, expert: int, slot: torch.Tensor) -> None:
        """Refuse heads that point outside the record.

        Raises:
            OSError: if one does.
        """
        shapes, places = _shapes(self.layer), _places(self.layer)
        for name, view in self.views(slot, (0,)).items():
            end = others_end(view, shapes[name]) + places[name]
            if end > self.stored_bytes(expert):
                raise OSError(
                    f"{self.file_of(expert)}: expert {expert} points to byte {end}; make it again with `expertier pack`"
                )

    def expand(self, views: Mapping[str, torch.Tensor], room: Mapping[str, torch.Tensor]) -> None:
        for name, compressed in views.items():
            expand(compressed, room[name])

    def token_rate(self, hardware: Hardware, *, is_fast: bool) -> float:
        return hardware.compressed_bytes_per_s or hardware.exact_bytes_per_s

    @classmethod
    def suits(cls, layer: ExpertLayer, views: Mapping[str, torch.Tensor]) -> bool:
        """Whether all matrices are of a kind that can be compressed, and the first expert gets smaller."""
        return _can_compress(layer) and sum(map(len, cls.encode(layer, views))) < layer.plain_bytes

    @classmethod
    def encode(cls, layer: ExpertLayer, views: Mapping[str, torch.Tensor]) -> list[bytes]:
        places, others_at = _places(layer), cls.record_bounds(layer)[0]
        wholes, others = [], []
        for parameter in layer.parameters:
            whole, rest = compress(views[parameter.name], others_at - places[parameter.name])
            wholes.append(whole.numpy().tobytes())
            others.append(rest.numpy().tobytes())
            others_at += len(rest)
        return wholes + others

    @classmethod
    def record_bounds(cls, layer: ExpertLayer) -> tuple[int, int]:
        """Without exponents that have no code, and with a byte for every weight."""
        if not _can_compress(layer):
            raise ValueError(f"{layer.module_name} has matrices that cannot be compressed")
        shapes = _shapes(layer).values()
        least = sum(shape.others_at for shape in shapes)
        return least, least + sum(shape.rows * shape.columns for shape in shapes)


def _can_compress(layer: ExpertLayer) -> bool:
    return all(can_compress(parameter.shape, parameter.dtype) for parameter in layer.parameters)


def _shapes(layer: ExpertLayer) -> dict[str, CompressedShape]:
    return {parameter.name: CompressedShape(*parameter.shape) for parameter in layer.parameters}


def _places(layer: ExpertLayer) -> dict[str, int]:
    """Where each matrix begins in the record."""
    shapes = _shapes(layer)
    starts = accumulate((shape.others_at for shape in shapes.values()), initial=0)
    return dict(zip(shapes, starts, strict=False))
