"""Where the stored parts of an expert lie in a slot: as the checkpoint's files hold them, or as a record does."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..checkpoint.quantised.entry import Place
from .quantised_parts import Piece

ALIGNMENT_BYTES = 64
"""Of a part in a record: a cache line, and a register of AVX-512."""


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
    return before[0].file == after[0].file and before[1] + before[2] == after[1]


def rounded(nbytes: int) -> int:
    """A whole multiple of the alignment of parts."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
