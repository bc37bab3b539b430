"""Experts stored as codes and scales: read from a checkpoint's own files or from a packed copy, expanded to compute."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from routing.ground.hardware import Hardware

from ..checkpoint.experts import ExpertLayer
from ..checkpoint.quantised.entry import Place
from ..checkpoint.tensors import TensorEntry
from ..codes.stored_matrix import StoredMatrix
from .form import BLOCK_BYTES, Extent, MatrixForm, PartReader, Region
from .quantised_parts import ALIGNMENT_BYTES, Piece, encodings_of, pieces_of


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of one piece: where it begins in its region of a slot."""

    parameter: str
    piece: int
    role: str
    nbytes: int
    region: int
    inside: int


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
    kernel: ClassVar[int | None] = None
    linears: ClassVar[MatrixForm | None] = None
    reaches_gpu: ClassVar[bool] = False
    is_expanded: ClassVar[bool] = True

    @cached_property
    def pieces(self) -> dict[str, tuple[Piece, ...]]:
        """Of each parameter."""
        return {parameter.name: pieces_of(parameter) for parameter in self.layer.parameters}

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
        experts = range(self.layer.num_experts)
        return {entry.file for expert in experts for entry, _, _ in _places(self.pieces, expert).values()}

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
        places = _places(self.pieces, expert)
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
        """A product reads the expanded matrices, which are larger than what is stored."""
        return hardware.exact_bytes_per_s * self.expert_bytes / self.layer.plain_bytes

    @classmethod
    def suits(cls, layer: ExpertLayer, views: Mapping[str, Any]) -> bool:
        return form_name(layer) == cls.name

    @classmethod
    def encode(cls, layer: ExpertLayer, views: Mapping[str, Any]) -> list[bytes]:
        """Each part as it is, on a whole multiple of 64 bytes."""
        parts = [part for matrices in views.values() for matrix in matrices for part in _parts_of(matrix)]
        wholes = [part.numpy().tobytes() for part in parts]
        return [*(whole.ljust(_rounded(len(whole)), b"\0") for whole in wholes[:-1]), wholes[-1]]

    @classmethod
    def record_bounds(cls, layer: ExpertLayer) -> tuple[int, int]:
        if form_name(layer) != cls.name:
            raise ValueError(f"{layer.module_name} is not stored as {cls.name} in this checkpoint")
        last = _in_record(cls(layer).pieces)[-1]
        return last.inside + last.nbytes, last.inside + last.nbytes

    @classmethod
    def of_records(cls, layer: ExpertLayer, record_E: Sequence[TensorEntry]) -> Self:
        return cls(layer, tuple(record_E))

    @cached_property
    def _parts(self) -> tuple[Part, ...]:
        """In the order in which they lie."""
        return _in_record(self.pieces) if self.record_E is not None else _in_files(self.pieces, self.layer.num_experts)


def form_name(layer: ExpertLayer) -> str:
    """The stored form of a layer, a key of FORMS: that of its quantised matrices, `mixed` if they differ."""
    names = encodings_of([piece for parameter in layer.parameters for piece in pieces_of(parameter)])
    return names.pop() if len(names) == 1 else "mixed"


def _numbered(pieces: Mapping[str, tuple[Piece, ...]]) -> Iterator[tuple[str, int, Piece]]:
    for name, several in pieces.items():
        for number, piece in enumerate(several):
            yield name, number, piece


def _places(pieces: Mapping[str, tuple[Piece, ...]], expert: int) -> dict[tuple[str, int, str], Place]:
    return {
        (name, number, role): place
        for name, number, piece in _numbered(pieces)
        for role, place in piece.places(expert).items()
    }


def _in_record(pieces: Mapping[str, tuple[Piece, ...]]) -> tuple[Part, ...]:
    parts, inside = [], 0
    for name, number, piece in _numbered(pieces):
        for role, nbytes in piece.part_bytes.items():
            parts.append(Part(parameter=name, piece=number, role=role, nbytes=nbytes, region=0, inside=inside))
            inside += _rounded(nbytes)
    return tuple(parts)


def _in_files(pieces: Mapping[str, tuple[Piece, ...]], num_experts: int) -> tuple[Part, ...]:
    """By their place in the files; neighbours of every expert share a region."""
    places_E = [_places(pieces, expert) for expert in range(num_experts)]
    keys = sorted(places_E[0], key=lambda key: (str(places_E[0][key][0].file), places_E[0][key][1]))
    parts: list[Part] = []
    before = None
    for key in keys:
        nbytes = places_E[0][key][2]
        if before is not None and all(_follows(places[before], places[key]) for places in places_E):
            region, inside = parts[-1].region, parts[-1].inside + parts[-1].nbytes
        else:
            region, inside = (parts[-1].region + 1 if parts else 0), 0
        name, number, role = before = key
        parts.append(Part(parameter=name, piece=number, role=role, nbytes=nbytes, region=region, inside=inside))
    return tuple(parts)


def _follows(before: Place, after: Place) -> bool:
    return before[0].file == after[0].file and before[1] + before[2] == after[1]


def _stored(piece: Piece, parts: dict[str, torch.Tensor]) -> StoredMatrix | PlainRows:
    if piece.encoding is None:
        return PlainRows(parts["codes"])
    # by role, in the order of records, whatever the order in which a checkpoint's files hold them
    in_order = {role: parts[role] for role in piece.part_bytes}
    return StoredMatrix(encoding=piece.encoding, rows=piece.rows, columns=piece.columns, parts=in_order)


def _parts_of(matrix: StoredMatrix | PlainRows) -> list[torch.Tensor]:
    return list(matrix.parts.values()) if isinstance(matrix, StoredMatrix) else [matrix.codes]


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class Mxfp4Form(QuantisedForm):
    """Floats of four bits (E2M1), an exponent for each 32."""

    name: ClassVar[str] = "mxfp4"


class Nvfp4Form(QuantisedForm):
    """Floats of four bits (E2M1), a float of eight bits for each 16, and a scale of these scales."""

    name: ClassVar[str] = "nvfp4"


class Mxfp8Form(QuantisedForm):
    """Floats of eight bits (E4M3), an exponent for each 32."""

    name: ClassVar[str] = "mxfp8"


class Fp8Form(QuantisedForm):
    """Floats of eight bits (E4M3), a scale for each block, row or tensor."""

    name: ClassVar[str] = "fp8"


class Int4Form(QuantisedForm):
    """Integers of four bits, a scale and perhaps a zero for each group."""

    name: ClassVar[str] = "int4"


class Int8Form(QuantisedForm):
    """Integers of eight bits, a scale and perhaps a zero for each row or group."""

    name: ClassVar[str] = "int8"


class Nf4Form(QuantisedForm):
    """Quantiles of four bits (bitsandbytes), a scale for each 64."""

    name: ClassVar[str] = "nf4"


class MixedForm(QuantisedForm):
    """Matrices of different stored forms in one layer."""

    name: ClassVar[str] = "mixed"


QUANTISED_FORMS: Mapping[str, type[QuantisedForm]] = {
    form.name: form for form in (Mxfp4Form, Nvfp4Form, Mxfp8Form, Fp8Form, Int4Form, Int8Form, Nf4Form, MixedForm)
}
