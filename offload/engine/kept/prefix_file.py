"""One kept prefix as a file: safetensors, written and read one tensor at a time, so that memory holds it once.

The name is the checksum of the tensors, so that damage is seen when it is read. A file is from outside: sizes and
shapes are checked before memory is taken.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from xxhash import xxh3_128

from routing.ground.files import atomic_write

SUFFIX = ".prefix.safetensors"
VERSION = "1"
MOST_HEADER_BYTES = 4 << 20
"""A header has about 200 bytes per layer; models have hundreds of layers at most."""
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I32": torch.int32,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
IDS = "token_ids"

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class PrefixLabel:
    """Whose prefix it is.

    Args:
        model: mark of the model and of how it computes; a prefix of another one is of no use.
        owner: mark of who asked; not his name, which may be a key.
        num_canonical: leading tokens that were read in whole pieces.
    """

    model: str
    owner: str
    num_canonical: int


def write_prefix(folder: Path, label: PrefixLabel, tensors: Tensors) -> Path:
    """Write a prefix, whole or not at all, for its owner's eyes only: prompts can be read from it.

    Args:
        folder: must exist.
        label: kept as metadata.
        tensors: token ids (int32) under IDS, and keys and values of layers.

    Returns:
        The file.
    """
    entries, offset = {}, 0
    for name, tensor in tensors.items():
        entries[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    metadata = {"format": "pt", "version": VERSION, **{name: str(value) for name, value in asdict(label).items()}}
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    header += b" " * (-len(header) % 8)
    path = folder / f"{_checksum(label, tensors)}{SUFFIX}"
    with atomic_write(path, "wb", is_private=True) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            file.write(_bytes_of(tensor.contiguous().cpu()))
    return path


def read_label(path: Path) -> tuple[PrefixLabel, torch.Tensor]:
    """Whose prefix a file holds, and its token ids, without reading the rest.

    Raises:
        ValueError: if it is not a kept prefix.
    """
    with path.open("rb") as file:
        label, entries, start = _read_header(path, file)
        if IDS not in entries:
            raise ValueError(f"{path} has no {IDS}; it is damaged")
        return label, _read_tensor(path, file, entries[IDS], start)


def read_prefix(path: Path) -> tuple[PrefixLabel, dict[str, torch.Tensor]]:
    """A whole prefix.

    Raises:
        ValueError: if the file is damaged: its checksum is its name.
    """
    with path.open("rb") as file:
        label, entries, start = _read_header(path, file)
        tensors = {name: _read_tensor(path, file, entry, start) for name, entry in entries.items()}
    if f"{_checksum(label, tensors)}{SUFFIX}" != path.name:
        raise ValueError(f"{path} is damaged: its contents do not have the checksum that is its name")
    return label, tensors


def _read_header(path: Path, file: IO[bytes]) -> tuple[PrefixLabel, dict[str, Any], int]:
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= MOST_HEADER_BYTES:
        raise ValueError(f"{path} is not a kept prefix: its header would have {length} bytes")
    try:
        header = json.loads(file.read(length))
        metadata = header.pop("__metadata__")
        version, canonical = metadata["version"], int(metadata["num_canonical"])
        label = PrefixLabel(model=str(metadata["model"]), owner=str(metadata["owner"]), num_canonical=canonical)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a kept prefix ({type(error).__name__}: {error})") from error
    if version != VERSION:
        raise ValueError(f"{path} has version {version!r}; this program reads {VERSION}")
    return label, header, 8 + length


def _read_tensor(path: Path, file: IO[bytes], entry: Any, start: int) -> torch.Tensor:
    try:
        dtype, shape = DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
        first, last = (int(offset) for offset in entry["data_offsets"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: a tensor is described by {str(entry)[:100]}") from error
    wanted = torch.Size(shape).numel() * dtype.itemsize
    if min([first, *shape]) < 0 or last - first != wanted or start + last > path.stat().st_size:
        raise ValueError(f"{path} is damaged: a tensor of {shape} does not lie at {first} to {last}")
    tensor = torch.empty(shape, dtype=dtype)
    file.seek(start + first)
    if file.readinto(_bytes_of(tensor)) != wanted:  # type: ignore[attr-defined]
        raise ValueError(f"{path} ends too early")
    return tensor


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor in memory."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _checksum(label: PrefixLabel, tensors: Tensors) -> str:
    state = xxh3_128(json.dumps(asdict(label), sort_keys=True).encode())
    for part in _parts(tensors):
        state.update(part)
    return str(state.hexdigest())


def _parts(tensors: Tensors) -> Iterator[Any]:
    for name, tensor in tensors.items():
        yield f"{name} {NAMES[tensor.dtype]} {list(tensor.shape)}".encode()
        yield _bytes_of(tensor.contiguous().cpu())
