"""The stored parts of an expert's matrices: which there are, where each lies in the files, and where in a slot."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..checkpoint.experts import ExpertLayer, Parameter, Source
from ..checkpoint.quantised.entry import Place, QuantisedEntry
from ..checkpoint.tensors import TensorEntry
from ..codes.stored_matrix import AnyEncoding

ALIGNMENT_BYTES = 64
"""Of a part in a record: a cache line, and a register of AVX-512."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Rows of a parameter that are stored alike: gate and up of one expert have scales of their own.

    Args:
        source: the tensors that hold them, one for each expert, or one fused tensor.
        encoding: what their bytes mean; None if they are plain.
        first_row: of the piece, in the stored matrix of one expert.
        target_row: of the piece, in the parameter.
        rows: how many there are.
        columns: of the stored matrix.
        is_transposed: whether the parameter holds the transpose.
    """

    source: Source
    encoding: AnyEncoding | None
    first_row: int
    target_row: int
    rows: int
    columns: int
    is_transposed: bool
    item_bytes: int

    @property
    def part_bytes(self) -> dict[str, int]:
        """Bytes of each part by role."""
        if self.encoding is None:
            return {"codes": self.rows * self.columns * self.item_bytes}
        return dict(self.encoding.part_bytes(self.rows, self.columns))

    @cached_property
    def spans(self) -> Mapping[str, tuple[int, int]]:
        """Where the rows begin in each part of an expert's own tensor, and their bytes; alike for all experts."""
        entry = self.source.entry_E[0]
        assert isinstance(entry, QuantisedEntry)
        places = entry.places(0, self.first_row, self.rows)
        return {role: (offset - part.offset, nbytes) for role, (part, offset, nbytes) in places.items()}

    def places(self, expert: int) -> dict[str, Place]:
        """Where each part of an expert lies."""
        entry = self.source.entry_E[expert]
        if not isinstance(entry, QuantisedEntry):
            row_bytes = self.columns * self.item_bytes
            _, offset, _ = self.source.place(expert)
            return {"codes": (entry, offset + self.first_row * row_bytes, self.rows * row_bytes)}
        if not self.source.is_fused:
            parts = entry.parts
            return {role: (parts[role], parts[role].offset + start, size) for role, (start, size) in self.spans.items()}
        if len(entry.shape) == 3:
            return entry.places(expert, self.first_row, self.rows)
        share = entry.rows // len(self.source.entry_E)
        return entry.places(0, expert * share + self.first_row, self.rows)


def is_quantised(layer: ExpertLayer) -> bool:
    """Whether some of a layer's weights are stored as codes."""
    return any(
        isinstance(source.entry_E[0], QuantisedEntry) for parameter in layer.parameters for source in parameter.sources
    )


def pieces_of(parameter: Parameter) -> tuple[Piece, ...]:
    """The pieces of a parameter, in the order in which they fill it.

    Raises:
        ValueError: if it is not made of whole rows of the stored matrices.
    """
    if parameter.runs is None:
        raise ValueError(_not_in_place(parameter, "more than its rows are rearranged, or a part has another dtype"))
    return tuple(_piece(parameter, run) for run in parameter.runs)


def _piece(parameter: Parameter, run: tuple[int, int, int, int]) -> Piece:
    number, inside, target, count = run
    source = parameter.sources[number]
    entry: TensorEntry = source.entry_E[0]
    item_bytes, columns, encoding, is_transposed = parameter.dtype.itemsize, parameter.shape[-1], None, False
    if isinstance(entry, QuantisedEntry):
        columns, encoding, is_transposed = entry.columns, entry.encoding, entry.is_transposed
    if is_transposed and (inside, target, count) != (0, 0, entry_rows(entry) * columns):
        raise ValueError(_not_in_place(parameter, "its stored matrix is a transpose of which only a part is needed"))
    if (
        inside % columns
        or target % columns
        or count % columns
        or (not is_transposed and columns != parameter.shape[-1])
    ):
        raise ValueError(_not_in_place(parameter, "rows of the stored matrices are cut"))
    return Piece(
        source=source,
        encoding=encoding,
        first_row=inside // columns,
        target_row=target // columns,
        rows=count // columns,
        columns=columns,
        is_transposed=is_transposed,
        item_bytes=item_bytes,
    )


def entry_rows(entry: TensorEntry) -> int:
    """Rows of one stored matrix."""
    return entry.rows if isinstance(entry, QuantisedEntry) else entry.shape[-2]


def _not_in_place(parameter: Parameter, reason: str) -> str:
    return (
        f"{parameter.full_name}: its quantised experts cannot be read where they are ({reason}); "
        "write a plain copy with `expertier dequantise` and load that"
    )


def encodings_of(pieces: Sequence[Piece]) -> set[str]:
    """Names of the stored forms that pieces have; plain ones have none."""
    return {piece.encoding.form for piece in pieces if piece.encoding is not None}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of one piece: where it begins in its region of a slot."""

    parameter: str
    piece: int
    role: str
    nbytes: int
    region: int
    inside: int


def _numbered(pieces: Mapping[str, tuple[Piece, ...]]) -> Iterator[tuple[str, int, Piece]]:
    for name, several in pieces.items():
        for number, piece in enumerate(several):
            yield name, number, piece


def places_of(pieces: Mapping[str, tuple[Piece, ...]], expert: int) -> dict[tuple[str, int, str], Place]:
    return {
        (name, number, role): place
        for name, number, piece in _numbered(pieces)
        for role, place in piece.places(expert).items()
    }


def parts_in_record(pieces: Mapping[str, tuple[Piece, ...]]) -> tuple[Part, ...]:
    parts, inside = [], 0
    for name, number, piece in _numbered(pieces):
        for role, nbytes in piece.part_bytes.items():
            parts.append(Part(parameter=name, piece=number, role=role, nbytes=nbytes, region=0, inside=inside))
            inside += rounded(nbytes)
    return tuple(parts)


def parts_in_files(pieces: Mapping[str, tuple[Piece, ...]], num_experts: int) -> tuple[Part, ...]:
    """By their place in the files; neighbours of every expert share a region."""
    places_E = [places_of(pieces, expert) for expert in range(num_experts)]
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
    return before[1] + before[2] == after[1] and before[0].file == after[0].file


def rounded(nbytes: int) -> int:
    """A whole multiple of the alignment of parts."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
