"""Where each tensor of a safetensors checkpoint lies: file, offset, size, checked before anything is read.

Torch is needed only to turn bytes into a tensor.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .weight_files import weight_map_of, weights_name

if TYPE_CHECKING:
    import torch

# of the header: the limit of the safetensors library is 100 MB too
MAX_HEADER_BYTES = 100 << 20
PLAIN_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
# of the safetensors dtypes with whole bytes
ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
TORCH_DTYPES = {
    "F64": "float64",
    "I64": "int64",
    "F32": "float32",
    "I32": "int32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
STORED_DTYPES = {name: stored for stored, name in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One stored tensor: `nbytes` bytes at `offset` of `file`, row-major."""

    name: str
    file: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that holds some of it."""
        return (self.file,)

    @property
    def layout(self) -> Any:
        """How its bytes lie, beside dtype and shape; None if row-major."""
        return None

    def torch_dtype(self) -> "torch.dtype":
        import torch

        if self.dtype not in TORCH_DTYPES:
            raise ValueError(
                f"{self.file}: tensor {self.name} has dtype {self.dtype}; supported are {sorted(TORCH_DTYPES)}"
            )
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[self.dtype])
        return dtype


def read_checkpoint(folder: str | os.PathLike[str]) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint in `folder`, from the files that transformers would read.

    That is the file or index that config.json names as `transformers_weights`, else `model.safetensors`, else the
    shards that the index names.

    Raises:
        ValueError: if a shard is missing, truncated or not a safetensors file; the message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder}: no such folder")
    entries: dict[str, TensorEntry] = {}
    source = folder / weights_name(folder)
    if not source.name.endswith(".json"):
        return read_header(source)
    weight_map = weight_map_of(source)
    for file_name in sorted(set(weight_map.values())):
        entries.update(read_header(folder / file_name))
    for name, file_name in weight_map.items():
        if name not in entries:
            raise ValueError(f"{folder / file_name}: tensor {name} is named in {source.name} but is not in the file")
    return entries


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, from its header, checked against the size of the file.

    Raises:
        ValueError: if the file is missing, truncated or not a safetensors file.
    """
    if not file.is_file():
        raise ValueError(f"{file}: missing shard; copy it again beside the others")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, max(size - 8, 0)):
            raise ValueError(f"{file}: not a safetensors file, or truncated ({size} bytes); copy it again")
        header = _parse(file, stream.read(header_bytes))
    alike: dict[Any, Any] = {}
    return {
        name: _entry(file, name, described, data_start=8 + header_bytes, size=size, alike=alike)
        for name, described in header.items()
        if name != "__metadata__"
    }


def _parse(file: Path, text: bytes) -> Mapping[str, Any]:
    try:
        header = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: the safetensors header is not JSON ({error}); copy the file again") from error
    if not isinstance(header, dict):
        raise ValueError(f"{file}: the safetensors header must be an object; got {type(header).__name__}")
    return header


def _entry(file: Path, name: str, described: Any, *, data_start: int, size: int, alike: dict[Any, Any]) -> TensorEntry:
    """One tensor of a header; `alike` has the dtypes and shapes that tensors before it have, which it shares."""
    try:
        dtype, shape = str(described["dtype"]), tuple(map(int, described["shape"]))
        begin, end = map(int, described["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: tensor {name} has a malformed header entry") from error
    if dtype in ITEM_BYTES and end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{file}: tensor {name} claims {end - begin} bytes for {dtype} {list(shape)}")
    if begin < 0 or begin > end or min(shape, default=0) < 0:
        raise ValueError(f"{file}: tensor {name} has offsets {begin}..{end} and shape {list(shape)}")
    if data_start + end > size:
        raise ValueError(
            f"{file}: truncated: tensor {name} ends at byte {data_start + end} and the file has {size}; copy it again"
        )
    dtype, shape = alike.setdefault(dtype, dtype), alike.setdefault(shape, shape)
    return TensorEntry(name, file, data_start + begin, end - begin, dtype, shape)


def read_into(entry_file: Path, descriptor: int, offset: int, target: memoryview) -> None:
    """Fill `target` from `offset` of an open file, however many reads that takes.

    Raises:
        OSError: if the file ends first, or the disk reports an error; the message names the file.
    """
    done = 0
    while done < len(target):
        try:
            count = os.preadv(descriptor, [target[done:]], offset + done)
        except OSError as error:
            raise OSError(
                error.errno, f"{entry_file}: reading {len(target)} bytes at {offset}: {error.strerror}"
            ) from error
        if count == 0:
            raise OSError(
                f"{entry_file}: the file ends at byte {offset + done}, {len(target) - done} bytes short; "
                "it was truncated or replaced while it was in use"
            )
        done += count


class StoredTensor:
    """A tensor that is read when it is indexed; stands in for a safetensors slice while transformers loads a model."""

    def __init__(self, entry: TensorEntry) -> None:
        self._entry = entry
        self.dtype = entry.torch_dtype()
        self.shape = entry.shape

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self._entry.dtype

    def __getitem__(self, key: Any) -> "torch.Tensor":
        tensor = read_tensor(self._entry)
        return tensor if key is Ellipsis else tensor[key]


def read_bytes(file: Path, offset: int, nbytes: int) -> "torch.Tensor":
    """Some bytes of a file, uint8, in memory of their own."""
    import torch

    raw = torch.empty(nbytes, dtype=torch.uint8)
    with file.open("rb", buffering=0) as stream:
        read_into(file, stream.fileno(), offset, memoryview(raw.numpy()))
    return raw


def read_tensor(entry: TensorEntry) -> "torch.Tensor":
    """Read one tensor into memory of its own."""
    import torch

    tensor = torch.empty(entry.shape, dtype=entry.torch_dtype())
    if entry.nbytes:
        raw = tensor.view(-1).view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)
        with entry.file.open("rb", buffering=0) as stream:
            read_into(entry.file, stream.fileno(), entry.offset, memoryview(raw.numpy()))
    return tensor
