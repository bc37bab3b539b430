"""One logical tensor of a quantised checkpoint: where its codes and companions lie, and how they are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch

from ...codes.encoding import Encoding
from ...codes.stored_matrix import AnyEncoding, StoredMatrix
from ..tensors import StoredTensor, TensorEntry, read_bytes

Place = tuple[TensorEntry, int, int]
"""Tensor, offset in its file, bytes."""


@dataclass(frozen=True, slots=True)
class QuantisedEntry(TensorEntry):
    """A tensor that is stored as codes and companions. Name, shape and dtype are those of the plain tensor.

    Args:
        encoding: what the bytes of each matrix mean.
        parts: the stored tensors by role; each has a share for every matrix, or one that all matrices use.
        rows: of each stored matrix.
        columns: of each stored matrix.
        is_transposed: whether the plain tensor holds the transposes of the stored matrices.
    """

    encoding: AnyEncoding
    parts: Mapping[str, TensorEntry]
    rows: int
    columns: int
    is_transposed: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        """Codes may lie in another shard than their scales."""
        return tuple(dict.fromkeys(part.file for part in self.parts.values()))

    @property
    def layout(self) -> Any:
        """Two tensors with the same layout lie alike."""
        return self.encoding, self.rows, self.columns, self.is_transposed

    @property
    def num_matrices(self) -> int:
        """Stored matrices, one for each expert of a fused tensor."""
        return prod(self.shape[:-2])

    def places(self, matrix: int, first_row: int, num_rows: int) -> dict[str, Place]:
        """Where each part of some rows of a matrix lies.

        Raises:
            ValueError: if the rows begin inside a group.
        """
        whole = _part_bytes(self.encoding, self.rows, self.columns)
        found = {}
        for role, nbytes in _part_bytes(self.encoding, num_rows, self.columns).items():
            part = self.parts[role]
            share = matrix * whole[role] if part.nbytes == self.num_matrices * whole[role] else 0
            inside = self.encoding.row_offset(role, first_row, self.rows, self.columns)
            found[role] = (part, part.offset + share + inside, nbytes)
        return found

    def is_in_rows(self) -> bool:
        """Whether the matrix can be held as `encoding.packed`; an index of groups is read for it."""
        encoding, order = self.encoding, self.parts.get("order")
        if isinstance(encoding, Encoding) or encoding.packed.has_order:
            return True
        parts = {} if order is None else {"order": read_bytes(order.file, order.offset, order.nbytes)}
        return encoding.is_in_order(parts, self.columns)

    def read(self, matrix: int) -> StoredMatrix:
        """One stored matrix, in memory of its own."""
        parts = {
            role: read_bytes(part.file, offset, nbytes)
            for role, (part, offset, nbytes) in self.places(matrix, 0, self.rows).items()
        }
        return StoredMatrix(encoding=self.encoding, rows=self.rows, columns=self.columns, parts=parts)


@cache
def _part_bytes(encoding: AnyEncoding, rows: int, columns: int) -> Mapping[str, int]:
    """Thousands of experts have the same."""
    return encoding.part_bytes(rows, columns)


class QuantisedTensor(StoredTensor):
    """A quantised tensor that is read and expanded when it is indexed."""

    def __init__(self, entry: QuantisedEntry) -> None:
        super().__init__(entry)
        self._quantised = entry

    def __getitem__(self, key: Any) -> torch.Tensor:
        entry = self._quantised
        tensor = torch.empty(entry.shape, dtype=self.dtype)
        for number, plain in enumerate(tensor.view(-1, *entry.shape[-2:])):
            entry.read(number).expand(plain, is_transposed=entry.is_transposed)
        return tensor if key is Ellipsis else tensor[key]


def lazy_tensor(entry: TensorEntry) -> StoredTensor:
    """What stands in for a tensor of a checkpoint while transformers loads a model."""
    return QuantisedTensor(entry) if isinstance(entry, QuantisedEntry) else StoredTensor(entry)
