"""What forms have in common whose experts are records of a packed copy: one contiguous, block-aligned record each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from ..checkpoint.experts import ExpertLayer
from ..checkpoint.tensors import TensorEntry
from ..native.kernel_matrix import KernelMatrix
from .form import BLOCK_BYTES, Extent, PartReader, Region


@dataclass(frozen=True, eq=False)
class PackedForm:
    """The experts of one layer as records; a form adds what its bytes mean.

    Args:
        layer: shapes and dtypes of the matrices.
        record_E: where each expert's record is, on a block of its file.
    """

    layer: ExpertLayer
    record_E: tuple[TensorEntry, ...]

    @property
    def is_straight(self) -> bool:
        return True

    @property
    def is_shiftable(self) -> bool:
        return True

    @classmethod
    def of_records(cls, layer: ExpertLayer, record_E: Sequence[TensorEntry]) -> Self:
        return cls(layer, tuple(record_E))

    @property
    def files(self) -> set[Path]:
        return {record.file for record in self.record_E}

    def file_of(self, expert: int) -> Path:
        return self.record_E[expert].file

    def offset_of(self, expert: int) -> int:
        return self.record_E[expert].offset

    def stored_bytes(self, expert: int) -> int:
        return self.record_E[expert].nbytes

    @property
    def expert_bytes(self) -> int:
        return -(-sum(record.nbytes for record in self.record_E) // self.layer.num_experts)

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        return (Region(0, max(record.nbytes for record in self.record_E)),)

    @cached_property
    def slot_bytes(self) -> int:
        return -(-self.regions[0].nbytes // BLOCK_BYTES) * BLOCK_BYTES

    @cached_property
    def own_slot_bytes(self) -> tuple[int, ...]:
        """Bytes of a slot for each expert, where every expert has one of its own."""
        return tuple(-(-record.nbytes // BLOCK_BYTES) * BLOCK_BYTES for record in self.record_E)

    def extents(self, expert: int) -> list[Extent]:
        record = self.record_E[expert]
        return [Extent(record, record.offset, record.nbytes, 0, 0)]

    def shifts(self, extents: Sequence[Extent]) -> tuple[int, ...]:
        """Records begin with a block of the file, so none."""
        return (0,)

    def can_multiply(self, *, is_transposed: bool) -> bool:
        """Not, unless a form says otherwise."""
        return False

    def kernel_matrices(self, views: Mapping[str, torch.Tensor], expert: int) -> dict[str, tuple[KernelMatrix, ...]]:
        """None, unless a form says otherwise."""
        return {}

    def convert(self, expert: int, slot: torch.Tensor, model: Any, read: PartReader) -> None:
        raise NotImplementedError("records are read straight into slots")
