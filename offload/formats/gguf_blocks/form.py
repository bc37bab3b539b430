"""Experts in the blocks of a GGUF file: gate, up and down may each have a type of their own, and layers may differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from routing.ground.hardware import Hardware

from ...checkpoint.experts import ExpertLayer, Parameter
from ...checkpoint.gguf.model import GgufModel
from ...checkpoint.gguf.names import ExpertMatrix
from ...checkpoint.tensors import TensorEntry
from ...native.kernel_matrix import GGUF, KernelMatrix
from ..form import BLOCK_BYTES, Extent, Form, MatrixEncoder, PartReader, Region
from .expand import expand_rows, has_expander, kernel_parameter

STRIP_ROWS = 128
"""Rows that are expanded at a time where a parameter has inputs as rows: 128 of 4,096 columns take 1 MiB."""


@dataclass(frozen=True, eq=False)
class GgufForm:
    """The experts of one layer as a GGUF file has them: one contiguous stretch of each matrix for each expert.

    Args:
        layer: shapes and dtypes of the matrices that the model computes with.
        matrices: what is stored, `[E, rows, columns]` each.
        is_transposed: whether the layer's parameters have inputs as rows; stored matrices never have.
    """

    layer: ExpertLayer
    matrices: tuple[ExpertMatrix, ...]
    is_transposed: bool

    name: ClassVar[str] = "gguf"
    linears: ClassVar[MatrixEncoder | None] = None
    reaches_gpu: ClassVar[bool] = False
    is_expanded: ClassVar[bool] = True
    guard_bytes: ClassVar[int] = 0
    is_straight: ClassVar[bool] = True
    is_shiftable: ClassVar[bool] = True

    @property
    def files(self) -> set[Path]:
        return {matrix.entry.file for matrix in self.matrices}

    def file_of(self, expert: int) -> Path:
        return self.matrices[0].entry.file

    def offset_of(self, expert: int) -> int:
        return self._extent(0, expert).offset

    @cached_property
    def expert_bytes(self) -> int:
        return sum(map(self._share, self.matrices))

    def stored_bytes(self, expert: int) -> int:
        return self.expert_bytes

    @property
    def types(self) -> tuple[str, ...]:
        """Name of each matrix's type in ggml."""
        return tuple(matrix.entry.dtype for matrix in self.matrices)

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        regions, start = [], 0
        for matrix in self.matrices:
            regions.append(Region(start, self._share(matrix)))
            start += -(-self._share(matrix) // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES
        return tuple(regions)

    @cached_property
    def slot_bytes(self) -> int:
        last = self.regions[-1]
        return last.start + -(-last.nbytes // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES

    @property
    def own_slot_bytes(self) -> tuple[int, ...]:
        """Experts are alike."""
        return (self.slot_bytes,) * self.layer.num_experts

    def extents(self, expert: int) -> list[Extent]:
        return [self._extent(region, expert) for region in range(len(self.matrices))]

    def shifts(self, extents: Sequence[Extent]) -> tuple[int, ...]:
        return tuple(extent.offset % BLOCK_BYTES for extent in extents)

    def convert(self, expert: int, slot: torch.Tensor, model: Any, read: PartReader) -> None:
        raise NotImplementedError("experts of a GGUF file are read straight into slots")

    def views(self, slot: torch.Tensor, shifts: Sequence[int]) -> dict[str, torch.Tensor]:
        """The stored bytes of each matrix, by the name of its parameter and its first row in it."""
        views = {}
        for matrix, region, shift in zip(self.matrices, self.regions, shifts, strict=True):
            start = region.start + shift
            views[_view_name(matrix)] = slot[start : start + region.nbytes]
        return views

    def can_multiply(self, *, is_transposed: bool) -> bool:
        """Where each matrix is expanded by our C and fills rows of its parameter that follow each other."""
        return is_transposed == self.is_transposed and all(
            matrix.row_step == 1 and has_expander(matrix.entry.dtype) for matrix in self.matrices
        )

    def kernel_matrices(self, views: Mapping[str, torch.Tensor], expert: int) -> dict[str, tuple[KernelMatrix, ...]]:
        if not self.can_multiply(is_transposed=self.is_transposed):
            return {}
        found: dict[str, tuple[KernelMatrix, ...]] = {}
        for matrix in sorted(self.matrices, key=lambda matrix: matrix.first_row):
            _, rows, columns = matrix.entry.shape
            address = views[_view_name(matrix)].data_ptr()
            one = KernelMatrix(GGUF, rows, columns, kernel_parameter(matrix.entry.dtype), address)
            found[matrix.parameter] = (*found.get(matrix.parameter, ()), one)
        return found

    def check(self, expert: int, slot: torch.Tensor) -> None:
        """Every byte is a code or a scale, so none can lead outside the slot."""

    def expand(self, views: Mapping[str, torch.Tensor], room: Mapping[str, torch.Tensor]) -> None:
        for matrix in self.matrices:
            whole = room[matrix.parameter].t() if self.is_transposed else room[matrix.parameter]
            count = matrix.entry.shape[1]
            rows_FD = whole[matrix.first_row :: matrix.row_step][:count]
            stored, row_bytes = views[_view_name(matrix)], self._share(matrix) // count
            step = STRIP_ROWS if self.is_transposed else count
            for first in range(0, count, step):
                target_FD = rows_FD[first : first + step]
                strip = stored[first * row_bytes : (first + len(target_FD)) * row_bytes]
                if self.is_transposed:
                    values_FD = target_FD.new_empty(target_FD.shape)
                    expand_rows(matrix.entry.dtype, strip, values_FD)
                    target_FD.copy_(values_FD)
                else:
                    expand_rows(matrix.entry.dtype, strip, target_FD)

    def token_rate(self, hardware: Hardware, *, is_fast: bool) -> float:
        """Blocks are expanded while they are multiplied, or before: that moves the bytes of the plain ones twice."""
        plain = self.layer.plain_bytes
        if self.can_multiply(is_transposed=self.is_transposed):
            return hardware.stored_rate(2 * self.expert_bytes / plain)
        return self.expert_bytes / (plain / hardware.token_rate(is_fast=is_fast) + plain / hardware.memory_bytes_per_s)

    @classmethod
    def suits(cls, layer: ExpertLayer, views: Mapping[str, torch.Tensor]) -> bool:
        return False

    @classmethod
    def encode(cls, layer: ExpertLayer, views: Mapping[str, torch.Tensor]) -> list[bytes]:
        raise NotImplementedError("GGUF files are read as they are, and never written")

    @classmethod
    def record_bounds(cls, layer: ExpertLayer) -> tuple[int, int]:
        raise ValueError("experts are not packed as GGUF blocks")

    @classmethod
    def of_records(cls, layer: ExpertLayer, record_E: Sequence[TensorEntry]) -> "GgufForm":
        raise ValueError("experts are not packed as GGUF blocks")

    def _share(self, matrix: ExpertMatrix) -> int:
        """Bytes of one expert."""
        return matrix.entry.nbytes // self.layer.num_experts

    def _extent(self, region: int, expert: int) -> Extent:
        matrix, share = self.matrices[region], self._share(self.matrices[region])
        offset = matrix.entry.offset + expert * share
        return Extent(matrix.entry, offset, share, region, self.regions[region].start)


def _view_name(matrix: ExpertMatrix) -> str:
    return f"{matrix.parameter}.{matrix.first_row}"


def gguf_forms(opened: GgufModel) -> list[Form]:
    """How each layer's experts are stored, in the order of the layers; empty for a dense model."""
    forms: list[Form] = []
    for module_name, matrices in opened.names.experts.items():
        module = opened.skeleton.get_submodule(module_name)
        names = dict.fromkeys(matrix.parameter for matrix in matrices)
        weights = {name: getattr(module, name) for name in names}
        parameters = tuple(
            Parameter(name, f"{module_name}.{name}", tuple(weight.shape[1:]), weight.dtype, (), None, None)
            for name, weight in weights.items()
        )
        layer = ExpertLayer(module_name, matrices[0].entry.shape[0], parameters)
        forms.append(GgufForm(layer, matrices, bool(module.is_transposed)))
    return forms
