"""The plain view of a checkpoint: every group of codes and companions is one tensor with a plain name and shape."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from ..tensors import STORED_DTYPES, TensorEntry
from .description import Quantisation
from .entry import QuantisedEntry
from .found import Found
from .spellings import COMPANION_ENDINGS, IGNORED_ENDINGS, SPELLINGS, Spelling

PART_ROLES = ("scales", "zeros", "global", "order", "nested", "table")
CODE_DTYPES = frozenset(dtype for spelling in SPELLINGS for dtype in spelling.dtypes)
SPELLINGS_OF = {dtype: [each for each in SPELLINGS if dtype in each.dtypes] for dtype in CODE_DTYPES}
"""In their order."""


def plain_view(
    folder: Path, entries: Mapping[str, TensorEntry], described: Quantisation, dtype: torch.dtype
) -> dict[str, TensorEntry]:
    """Present quantised tensors as plain ones.

    Args:
        folder: of the checkpoint, for messages.
        entries: the tensors that are in the files.
        described: what the config says of them.
        dtype: what weights are rounded to.

    Returns:
        Plain tensors as they are, and a QuantisedEntry for each group of codes and companions.

    Raises:
        ValueError: if codes lack a companion, one has a wrong shape or dtype, or two tensors share a name; the message
            names the tensor.
    """
    view, consumed, alike = dict[str, TensorEntry](), set[str](), dict[Any, _Read]()
    stored = STORED_DTYPES[str(dtype).removeprefix("torch.")]
    try:
        for key, codes in entries.items():
            if codes.dtype not in CODE_DTYPES or (spelled := _spelled(codes, entries)) is None:
                continue
            name, spelling, companions = spelled
            likeness = _likeness(spelling, codes, companions)
            if (read := alike.get(likeness)) is None:
                read = _checked(codes, companions, spelling.read(codes, companions, described))
                if spelling.is_by_shape:
                    alike[likeness] = read
            if name != key and name in entries:
                raise ValueError(f"{name} is there both plain and as {key}")
            view[name] = _entry(name, codes, companions, read, stored)
            consumed |= {key, *(companion.name for companion in companions.values())}
        quantised = bool(view) or described.method is not None
        for key, entry in entries.items():
            if key not in consumed:
                if quantised:
                    _expect_no_codes(entry)
                view[key] = entry
    except ValueError as error:
        raise ValueError(f"model {folder}: {error}") from error
    return view


def unused_companion(unused: Sequence[str], used: Mapping[str, Any]) -> str | None:
    """A companion that nothing has consumed, though it stands beside a tensor that the model uses.

    Args:
        unused: checkpoint keys that the model has no use for.
        used: checkpoint keys that it uses.
    """
    for key in unused:
        if key.rpartition(".")[2].endswith(IGNORED_ENDINGS):
            continue
        stems = (key[: -len(ending)] for ending in COMPANION_ENDINGS if key.endswith(ending))
        if any(stem in used or f"{stem}.weight" in used for stem in stems):
            return key
    return None


def _spelled(
    codes: TensorEntry, entries: Mapping[str, TensorEntry]
) -> tuple[str, Spelling, dict[str, TensorEntry]] | None:
    """The plain name, the spelling and the companions of codes; None if this is something else."""
    for spelling in SPELLINGS_OF[codes.dtype]:
        if not codes.name.endswith(spelling.ending):
            continue
        name = codes.name.removesuffix(spelling.ending) + spelling.plain_ending
        companions, missing = dict[str, TensorEntry](), ""
        for role, endings in (*spelling.needed.items(), *spelling.optional.items()):
            found = next((entries[key] for key in _names(name, endings) if key in entries), None)
            if found is not None:
                companions[role] = found
            elif role in spelling.needed:
                missing = missing or f"{name.removesuffix('.weight') if spelling.plain_ending else name}{endings[0]}"
        if not missing:
            return name, spelling, companions
        if spelling.ending:
            raise ValueError(f"{codes.name} {codes.dtype} {list(codes.shape)} has no {missing} beside it")
    return None


def _likeness(spelling: Spelling, codes: TensorEntry, companions: Mapping[str, TensorEntry]) -> Any:
    """The same for codes of which a spelling that `is_by_shape` finds the same; None for other spellings."""
    if not spelling.is_by_shape:
        return None
    described = ((role, each.dtype, each.shape, each.nbytes) for role, each in companions.items())
    return id(spelling), codes.dtype, codes.shape, codes.nbytes, *described


def _names(name: str, endings: Sequence[str]) -> Iterator[str]:
    for ending in endings:
        yield name + ending
        if ending.startswith("."):
            yield name.removesuffix(".weight") + ending


def _expect_no_codes(entry: TensorEntry) -> None:
    """Floats of eight bits without a scale, in a checkpoint that is quantised: without it they are numbers of nothing.

    Raises:
        ValueError: if that is what it is.
    """
    if entry.dtype.startswith(("F8_E4M3", "F8_E5M2", "F4")) and len(entry.shape) >= 2:
        raise ValueError(f"{entry.name} {entry.dtype} {list(entry.shape)} has no {entry.name}_scale beside it")


@dataclass(frozen=True, kw_only=True)
class _Read:
    """What thousands of experts have alike: the encoding, the roles of their parts, bytes of all parts."""

    found: Found
    roles: tuple[str, ...]
    nbytes: int


def _checked(codes: TensorEntry, companions: Mapping[str, TensorEntry], found: Found) -> _Read:
    """Check that each part has the bytes that its encoding needs, and that none is left over.

    Raises:
        ValueError: if a part has other bytes, or is of no use.
    """
    wanted = found.encoding.part_bytes(found.rows, found.columns)
    roles = tuple(role for role in PART_ROLES if role in companions and (role in wanted or role != "order"))
    parts = {"codes": codes, **{role: companions[role] for role in roles}}
    matrices = prod(found.shape[:-2])
    for role, nbytes in wanted.items():
        shares = (nbytes * matrices, nbytes) if role != "codes" else (nbytes * matrices,)
        if parts[role].nbytes not in shares:
            raise ValueError(
                f"{parts[role].name} {parts[role].dtype} {list(parts[role].shape)}: has {parts[role].nbytes} bytes, "
                f"{codes.name} {list(codes.shape)} needs {shares[0]}"
            )
    if extra := parts.keys() - wanted.keys():
        raise ValueError(f"{parts[min(extra)].name} stands beside {codes.name}, which has no use for it")
    return _Read(found=found, roles=roles, nbytes=sum(part.nbytes for part in parts.values()))


def _entry(
    name: str, codes: TensorEntry, companions: Mapping[str, TensorEntry], read: _Read, stored: str
) -> QuantisedEntry:
    found = read.found
    return QuantisedEntry(
        name,
        codes.file,
        codes.offset,
        read.nbytes,
        stored,
        found.shape,
        encoding=found.encoding,
        parts={"codes": codes, **{role: companions[role] for role in read.roles}},
        rows=found.rows,
        columns=found.columns,
        is_transposed=found.is_transposed,
    )
