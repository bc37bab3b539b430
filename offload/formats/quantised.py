"""Experts stored as codes and scales: read from a checkpoint's own files or from a packed copy, expanded to compute."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from routing.ground.hardware import Hardware

from ..checkpoint.experts import ExpertLayer
from ..checkpoint.tensors import TensorEntry
from ..codes.encoding import Encoding
from ..codes.expander import has_exact_kernel
from ..codes.stored_matrix import StoredMatrix
from ..native.kernel_matrix import KernelMatrix
from .form import BLOCK_BYTES, Extent, MatrixEncoder, PartReader, Region
from .quantised_parts import (
    Part,
    Piece,
    encodings_of,
    parts_in_files,
    parts_in_record,
    pieces_of,
    places_of,
    rounded,
)


@dataclass(frozen=True)
class PlainRows:
    """Rows that are stored as the model has them, beside others that are quantised."""

    codes: torch.Tensor

    def expand(self, out: torch.Tensor, *, is_transposed: bool = False) -> None:
        """Copy them."""
        out.view(-1).view(torch.uint8).copy_(self.codes)


@dataclass(frozen=True, eq=False)
class QuantisedForm:
    """The experts of one layer as their checkpoint stores them.

    Parts that follow each other in the file for every expert share a region, so that one read fills them.

    Args:
        layer: shapes and dtypes of the matrices, and where their codes and companions are.
        record_E: where each expert's record is in a packed copy; None reads the checkpoint's own files.
    """

    layer: ExpertLayer
    record_E: tuple[TensorEntry, ...] | None = None

    name: ClassVar[str] = "quantised"
    linears: ClassVar[MatrixEncoder | None] = None
    reaches_gpu: ClassVar[bool] = False
    is_expanded: ClassVar[bool] = True

    @cached_property
    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """Of each parameter."""
        pieces = {parameter.name: pieces_of(parameter) for parameter in self.layer.parameters}
        return pieces if self.record_E is None else _as_packed(pieces)

    @property
    def own_slot_bytes(self) -> tuple[int, ...]:
        """Experts are alike."""
        return (self.slot_bytes,) * self.layer.num_experts

    @property
    def guard_bytes(self) -> int:
        """Parts are read to their end and no further."""
        return 0

    @property
    def is_straight(self) -> bool:
        return True

    @property
    def is_shiftable(self) -> bool:
        return True

    @property
    def expert_bytes(self) -> int:
        return sum(part.nbytes for part in self._parts)

    @cached_property
    def files(self) -> set[Path]:
        if self.record_E is not None:
            return {record.file for record in self.record_E}
        sources = {id(piece.source): piece.source for pieces in self.pieces.values() for piece in pieces}
        entries = {id(entry): entry for source in sources.values() for entry in source.entry_E}
        return {file for entry in entries.values() for file in entry.files}

    def file_of(self, expert: int) -> Path:
        return self.extents(expert)[0].entry.file

    def offset_of(self, expert: int) -> int:
        return self.extents(expert)[0].offset

    def stored_bytes(self, expert: int) -> int:
        return self.expert_bytes if self.record_E is None else self.record_E[expert].nbytes

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        regions, start = list[Region](), 0
        for _, group in groupby(self._parts, key=lambda part: part.region):
            last = list(group)[-1]
            regions.append(Region(start, last.inside + last.nbytes))
            start += -(-regions[-1].nbytes // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES
        return tuple(regions)

    @cached_property
    def slot_bytes(self) -> int:
        last = self.regions[-1]
        return last.start + -(-last.nbytes // BLOCK_BYTES) * BLOCK_BYTES + BLOCK_BYTES

    def extents(self, expert: int) -> list[Extent]:
        if self.record_E is not None:
            record = self.record_E[expert]
            return [Extent(record, record.offset, record.nbytes, 0, 0)]
        places = places_of(self.pieces, expert)
        extents = []
        for number, group in groupby(self._parts, key=lambda part: part.region):
            first = next(group)
            entry, offset, _ = places[first.parameter, first.piece, first.role]
            region = self.regions[number]
            extents.append(Extent(entry, offset, region.nbytes, number, region.start))
        return extents

    def shifts(self, extents: Sequence[Extent]) -> tuple[int, ...]:
        return tuple(extent.offset % BLOCK_BYTES for extent in extents)

    def views(self, slot: torch.Tensor, shifts: Sequence[int]) -> dict[str, Any]:
        """The stored matrices of each parameter, in the order of its pieces."""
        found: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
        for part in self._parts:
            start = self.regions[part.region].start + shifts[part.region] + part.inside
            found.setdefault((part.parameter, part.piece), {})[part.role] = slot[start : start + part.nbytes]
        return {
            name: tuple(_stored(piece, found[name, number]) for number, piece in enumerate(pieces))
            for name, pieces in self.pieces.items()
        }

    def can_multiply(self, *, is_transposed: bool) -> bool:
        """Where all rows of a parameter are stored alike, whatever way the model has them."""
        return all(_are_halves(pieces) for pieces in self.pieces.values()) and all(
            isinstance(piece.encoding, Encoding)
            and has_exact_kernel(piece.encoding)
            and piece.is_transposed == is_transposed
            for pieces in self.pieces.values()
            for piece in pieces
        )

    def kernel_matrices(self, views: Mapping[str, Any], expert: int) -> dict[str, tuple[KernelMatrix, ...]]:
        if not all(_is_in_rows(matrix) for matrices in views.values() for matrix in matrices):
            return {}
        return {name: tuple(matrix.kernel_matrix() for matrix in matrices) for name, matrices in views.items()}

    def check(self, expert: int, slot: torch.Tensor) -> None:
        """Nothing that codes and scales hold can do harm."""

    def convert(self, expert: int, slot: torch.Tensor, model: Any, read: PartReader) -> None:
        raise NotImplementedError("parts are read straight into slots")

    def expand(self, views: Mapping[str, Any], room: Mapping[str, torch.Tensor]) -> None:
        for name, matrices in views.items():
            for piece, matrix in zip(self.pieces[name], matrices, strict=True):
                out = room[name]
                if not piece.is_transposed:
                    out = out.view(-1, piece.columns)[piece.target_row : piece.target_row + piece.rows]
                matrix.expand(out, is_transposed=piece.is_transposed)

    def token_rate(self, hardware: Hardware, *, is_fast: bool) -> float:
        """Codes are expanded while they are multiplied, or before: then products read the larger plain matrices."""
        share = self.expert_bytes / self.layer.plain_bytes
        is_multiplied = self.can_multiply(is_transposed=False) or self.can_multiply(is_transposed=True)
        return hardware.stored_rate(2 * share) if is_multiplied else hardware.exact_bytes_per_s * share

    @classmethod
    def suits(cls, layer: ExpertLayer, views: Mapping[str, Any]) -> bool:
        return form_name(layer) == cls.name

    @classmethod
    def encode(cls, layer: ExpertLayer, views: Mapping[str, Any]) -> list[bytes]:
        """Each part as it is, on a whole multiple of 64 bytes; what runs down the columns is turned to rows."""
        parts = [part for matrices in views.values() for matrix in matrices for part in _parts_of(matrix)]
        wholes = [part.numpy().tobytes() for part in parts]
        return [*(whole.ljust(rounded(len(whole)), b"\0") for whole in wholes[:-1]), wholes[-1]]

    @classmethod
    def record_bounds(cls, layer: ExpertLayer) -> tuple[int, int]:
        if packed_name(layer) != cls.name:
            raise ValueError(f"{layer.module_name} is not stored as {cls.name} in this checkpoint")
        last = parts_in_record(_as_packed(cls(layer).pieces))[-1]
        return last.inside + last.nbytes, last.inside + last.nbytes

    @classmethod
    def of_records(cls, layer: ExpertLayer, record_E: Sequence[TensorEntry]) -> Self:
        return cls(layer, tuple(record_E))

    @cached_property
    def _parts(self) -> tuple[Part, ...]:
        """In the order in which they lie."""
        return (
            parts_in_record(self.pieces)
            if self.record_E is not None
            else parts_in_files(self.pieces, self.layer.num_experts)
        )


def _is_in_rows(matrix: StoredMatrix | PlainRows) -> bool:
    if not isinstance(matrix, StoredMatrix) or not isinstance(matrix.encoding, Encoding):
        return False
    return has_exact_kernel(matrix.encoding)


def _are_halves(pieces: Sequence[Piece]) -> bool:
    """Whether a parameter is one piece, or two of as many rows, stored alike."""
    first, *others = pieces
    return not others or (
        len(others) == 1
        and others[0].rows == first.rows
        and others[0].encoding == first.encoding
        and first.target_row < others[0].target_row
    )


def form_name(layer: ExpertLayer) -> str:
    """The stored form of a layer, a key of FORMS: that of its quantised matrices, `mixed` if they differ."""
    return _common_name([piece for parameter in layer.parameters for piece in pieces_of(parameter)])


def packed_name(layer: ExpertLayer) -> str:
    """The stored form of a layer in a packed copy, where what runs down the columns is turned to rows."""
    pieces = _as_packed({parameter.name: pieces_of(parameter) for parameter in layer.parameters})
    return _common_name([piece for several in pieces.values() for piece in several])


def _common_name(pieces: Sequence[Piece]) -> str:
    names = encodings_of(pieces)
    return names.pop() if len(names) == 1 else "mixed"


def _as_packed(pieces: Mapping[str, tuple[Piece, ...]]) -> dict[str, tuple[Piece, ...]]:
    return {
        name: tuple(replace(piece, encoding=piece.encoding and piece.encoding.packed) for piece in several)
        for name, several in pieces.items()
    }


def _stored(piece: Piece, parts: dict[str, torch.Tensor]) -> StoredMatrix | PlainRows:
    if piece.encoding is None:
        return PlainRows(parts["codes"])
    # by role, in the order of records, whatever the order in which a checkpoint's files hold them
    in_order = {role: parts[role] for role in piece.part_bytes}
    return StoredMatrix(encoding=piece.encoding, rows=piece.rows, columns=piece.columns, parts=in_order)


def _parts_of(matrix: StoredMatrix | PlainRows) -> list[torch.Tensor]:
    return list(matrix.packed().parts.values()) if isinstance(matrix, StoredMatrix) else [matrix.codes]
