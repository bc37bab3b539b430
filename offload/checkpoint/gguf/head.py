"""The head of a GGUF file, checked: metadata, and where each tensor lies. Without torch.

The reader of the `gguf` package maps the whole file, trusts every count in it, and reads one file of a split model.
This one bounds what it reads, refuses tensors that overlap or leave the file, and joins the files of a split model.
Sizes of blocks are that package's. The tests compare both readers.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from ..tensors import TensorEntry
from .library import gguf_library
from .stream import MAX_NAME_BYTES, CutShort, HeadStream

MAGIC = b"GGUF"
# version 1 counted in 32 bits; no published file has it any more
VERSIONS = (2, 3)
# what llama.cpp takes where a file does not say
DEFAULT_ALIGNMENT = 32
# a page of 4 KiB is the most that was seen; this bounds the gap before the data only
MAX_ALIGNMENT = 1 << 20
# of ggml
MAX_AXES = 4
# five digits in a name; the largest models have some 50
MAX_PARTS = 10_000
# name, axes, one length, type and offset; key, type and one byte
LEAST_TENSOR_BYTES, LEAST_VALUE_BYTES = 8 + 4 + 8 + 4 + 8, 8 + 4 + 1
PART_NAME = re.compile(r"^(?P<stem>.*)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf$")


@dataclass(frozen=True, kw_only=True, eq=False)
class GgufHead:
    """A GGUF model, of one file or several.

    Args:
        file: the first file, for messages.
        metadata: of the first file.
        entries: tensors of all files by name, with the name of their type in ggml as dtype, shape as torch has it.
    """

    file: Path
    metadata: Mapping[str, Any]
    entries: Mapping[str, TensorEntry]

    @property
    def architecture(self) -> str:
        """Name of the architecture in ggml."""
        return str(self.metadata["general.architecture"])

    def own(self, key: str) -> Any:
        """A value of the architecture's own, such as `expert_count`; None if the file does not say."""
        return self.metadata.get(f"{self.architecture}.{key}")


def read_gguf(file: Path) -> GgufHead:
    """Read the heads of a GGUF model; of a split one, all files, whichever is given.

    Raises:
        ValueError: if a file is missing, truncated or damaged; the message names it.
    """
    parts = part_files(file)
    metadata, entries = _read_file(parts[0])
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError(f"{parts[0]}: the file does not name its architecture (general.architecture)")
    count = metadata.get("split.count", 1)
    if count not in (0, len(parts)) and not (count == 1 and len(parts) == 1):
        raise ValueError(
            f"{parts[0]}: one of {count} files by its metadata, and {len(parts)} by its name; "
            "give the files the names that they were published under"
        )
    for number, part in enumerate(parts[1:], 1):
        described, more = _read_file(part)
        if described.get("split.no") != number or described.get("split.count") != len(parts):
            raise ValueError(f"{part}: not part {number + 1} of {len(parts)} by its metadata; copy it again")
        if twice := sorted(entries.keys() & more.keys()):
            raise ValueError(f"{part}: tensor {twice[0]} is in an earlier file as well")
        entries.update(more)
    total = metadata.get("split.tensors.count", len(entries))
    if len(parts) > 1 and total != len(entries):
        raise ValueError(f"{parts[0]}: its files hold {len(entries)} tensors instead of {total}; copy them again")
    return GgufHead(file=parts[0], metadata=metadata, entries=entries)


def is_gguf(place: Path) -> bool:
    """Whether a model is a GGUF file; otherwise it is a folder."""
    return place.suffix == ".gguf"


def has_config_file(file: Path) -> bool:
    """Whether the model's own config.json lies beside a GGUF file; its tokenizer is then used as well."""
    return (file.parent / "config.json").is_file()


def gguf_in(folder: Path) -> Path | None:
    """The GGUF model of a folder: its only file, or the first of its only split model; None without one.

    Raises:
        ValueError: if there are several models.
    """
    files = sorted(folder.glob("*.gguf"))
    named = [PART_NAME.match(file.name) for file in files]
    firsts = [file for file, part in zip(files, named, strict=True) if part is None or part["part"] == "00001"]
    if len(firsts) > 1:
        shown = ", ".join(file.name for file in firsts[:5])
        raise ValueError(f"model {folder}: several GGUF files ({shown}); name the one that is wanted")
    if files and not firsts:
        raise ValueError(f"model {folder}: the first file beside {files[0].name} is missing; copy it there")
    return firsts[0] if firsts else None


def part_files(file: Path) -> list[Path]:
    """All files of the model that `file` is a part of, in order.

    Raises:
        ValueError: if one is missing.
    """
    named = PART_NAME.match(file.name)
    if named is None:
        files = [file]
    else:
        count = int(named["parts"])
        if not 1 <= count <= MAX_PARTS:
            raise ValueError(f"{file}: a model of {count} files by its name")
        files = [file.with_name(f"{named['stem']}-{part:05d}-of-{count:05d}.gguf") for part in range(1, count + 1)]
    for part in files:
        if not part.is_file():
            raise ValueError(f"{part}: no such file" + ("; copy it beside the others" if len(files) > 1 else ""))
    return files


def head_bytes(opened: BinaryIO, size: int) -> int:
    """Bytes before the weights of a GGUF file of which the first `size` are here; more than those, if it goes on.

    Raises:
        ValueError: if it is no GGUF file.
    """
    stream = HeadStream(Path("the beginning of the file"), opened, size)
    try:
        _read_head(stream)
    except CutShort:
        return size + 1
    return stream.position


def _read_head(stream: HeadStream) -> tuple[dict[str, Any], list[tuple[str, tuple[int, ...], int, int]], int]:
    """Metadata, tensors as they are described, and the alignment of their data."""
    if stream.take(4) != MAGIC:
        raise stream.fault("not a GGUF file")
    _expect_version(stream)
    num_tensors, num_values = stream.number("Q"), stream.number("Q")
    stream.expect_room(num_tensors, LEAST_TENSOR_BYTES, "tensors")
    stream.expect_room(num_values, LEAST_VALUE_BYTES, "values")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = stream.text(MAX_NAME_BYTES)
        if key in metadata:
            raise stream.fault(f"the metadata has {key} twice")
        metadata[key] = stream.value(stream.number("I"))
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise stream.fault(f"general.alignment must be a power of 2 up to {MAX_ALIGNMENT}; got {alignment!r}")
    return metadata, [_tensor(stream) for _ in range(num_tensors)], alignment


def _read_file(file: Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        stream = HeadStream(file, opened, size)
        metadata, described, alignment = _read_head(stream)
        start = -(-stream.position // alignment) * alignment
    entries: dict[str, TensorEntry] = {}
    for entry in _placed(file, described, start, alignment, size):
        if entry.name in entries:
            raise ValueError(f"{file}: tensor {entry.name} is there twice")
        entries[entry.name] = entry
    return metadata, entries


def _expect_version(stream: HeadStream) -> None:
    version = stream.number("I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "a big-endian file" if swapped in VERSIONS else f"version {version}"
        raise stream.fault(f"GGUF of version {' or '.join(map(str, VERSIONS))}, little-endian, is read; this is {what}")


def _tensor(stream: HeadStream) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape in torch's order, number of the type, offset after the head."""
    name = stream.text(MAX_NAME_BYTES)
    axes = stream.number("I")
    if not 1 <= axes <= MAX_AXES:
        raise stream.fault(f"tensor {name} has {axes} axes; 1 to {MAX_AXES} are possible")
    lengths = [stream.number("Q") for _ in range(axes)]
    return name, tuple(reversed(lengths)), stream.number("I"), stream.number("Q")


def _placed(
    file: Path, described: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int, size: int
) -> Iterator[TensorEntry]:
    """Tensors by their place in the file, checked against it and each other."""
    gguf = gguf_library()
    found = []
    for name, shape, number, offset in described:
        try:
            kind = gguf.GGMLQuantizationType(number)
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise ValueError(f"{file}: tensor {name} is stored as type {number}, which gguf does not know") from error
        if min(shape) < 1 or shape[-1] % block:
            raise ValueError(f"{file}: tensor {name} {list(shape)} cannot be in blocks of {block} columns")
        if offset % alignment:
            raise ValueError(f"{file}: tensor {name} begins at {offset}, no multiple of {alignment}; copy it again")
        nbytes = math.prod(shape) // block * block_bytes
        found.append(TensorEntry(name, file, start + offset, nbytes, kind.name, shape))
    found.sort(key=lambda entry: entry.offset)
    for before, after in pairwise(found):
        if before.offset + before.nbytes > after.offset:
            raise ValueError(f"{file}: tensors {before.name} and {after.name} overlap; copy the file again")
    if found and (end := found[-1].offset + found[-1].nbytes) > size:
        raise ValueError(
            f"{file}: truncated: tensor {found[-1].name} ends at byte {end} and the file has {size}; copy it again"
        )
    yield from found
