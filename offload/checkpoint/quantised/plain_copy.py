"""A quantised checkpoint written out as a plain one, a matrix at a time; and any copy with other tensors.

The copy grows in `OUT.part` and takes its name at the end. Shards that are complete stay there when a run is
interrupted, and the next run of the same checkpoint goes on after them.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from routing.ground.expect import expect_new
from routing.ground.files import atomic_write, write_json
from routing.ground.safetensors_head import safetensors_head

from ..location import local_folder, read_json
from ..tensors import ITEM_BYTES, TensorEntry, read_checkpoint
from ..weight_files import INDEX_NAME, ONLY_NAME
from .description import find_quantisation
from .entry import QuantisedEntry
from .view import plain_view

SHARD_BYTES = 5 << 30
"""Of one file at most, unless a single tensor is larger; what transformers writes, too."""
COPY_BYTES = 64 << 20
"""Plain tensors are copied in pieces: larger ones save no time that was seen, smaller ones cost calls."""
PLAN_NAME = "dequantise.json"
NOT_COPIED = ("config.json", "hf_quant_config.json", PLAN_NAME)

Shards = dict[str, list[TensorEntry]]


def dequantise(
    path_or_id: str | Path,
    out: Path,
    *,
    dtype: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the plain checkpoint that a quantised one stands for; it needs no quantisation library.

    Args:
        path_or_id: a folder with safetensors weights, or a model id.
        out: the folder to write; must not exist.
        dtype: what weights are rounded to: `"bfloat16"`, `"float16"`, `"float32"`, or `"auto"`, the config's.
        shard_bytes: size of a file at most.
        progress: told after each matrix how many bytes are written, and how many there are.

    Returns:
        `out`.

    Raises:
        ValueError: if nothing is quantised, the checkpoint is damaged, or `out` exists.
    """
    expect_new(out)
    folder = local_folder(path_or_id)
    config = read_json(folder / "config.json", f"model {folder}: config.json")
    view = plain_view(folder, read_checkpoint(folder), find_quantisation(folder), _dtype(folder, config, dtype))
    if not any(isinstance(entry, QuantisedEntry) for entry in view.values()):
        raise ValueError(f"model {folder}: none of its weights is quantised; there is nothing to write")
    plan = {"dtype": dtype}
    return write_copy(folder, out, view, _plain_config(config), plan, shard_bytes=shard_bytes, progress=progress)


def write_copy(
    folder: Path,
    out: Path,
    view: Mapping[str, TensorEntry],
    config: Mapping[str, Any],
    plan: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a checkpoint whose tensors come from another one; goes on after the last complete file.

    Args:
        folder: of the other one; its tokenizer and other small files are copied.
        out: the folder to write; must not exist.
        view: the tensors by name, plain, quantised (written plainly) or made.
        config: for config.json.
        plan: what tells this copy from another of the same checkpoint; JSON values.
        shard_bytes: size of a file at most.
        progress: told after each matrix how many bytes are written, and how many there are.

    Raises:
        ValueError: if something is in the way.
    """
    shards = _shards(view, shard_bytes)
    counts = {name: len(entries) for name, entries in shards.items()}
    part = _own_part(out, {"source": _source(view), **plan, "shards": counts})
    _write_shards(part, shards, progress)
    for file in folder.iterdir():
        if file.is_file() and file.name not in NOT_COPIED and not _is_weights(file):
            shutil.copyfile(file, part / file.name)
    if len(shards) > 1:
        weight_map = {entry.name: name for name, entries in shards.items() for entry in entries}
        total = sum(plain_bytes(entry) for entry in view.values())
        write_json(part / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(part / "config.json", dict(config))
    (part / PLAN_NAME).unlink()
    part.rename(out)
    return out


@dataclass(frozen=True)
class MadeEntry(TensorEntry):
    """A tensor that is made when it is written. Its file is what it is made from.

    Args:
        make: gives its bytes.
    """

    make: Callable[[], bytes]


def plain_bytes(entry: TensorEntry) -> int:
    """Of a tensor in the plain copy."""
    if not isinstance(entry, QuantisedEntry):
        return entry.nbytes
    return entry.num_matrices * entry.rows * entry.columns * ITEM_BYTES[entry.dtype]


def _dtype(folder: Path, config: Mapping[str, Any], dtype: str) -> torch.dtype:
    """What weights are rounded to. The config is read as JSON, so that models are written that transformers lacks."""
    named = dtype
    if named == "auto":
        parts = (config, *(value for key, value in config.items() if isinstance(value, dict) and "text" in key))
        names = [part.get(key) for part in parts for key in ("dtype", "torch_dtype")]
        named = str(next((name for name in names if name), "bfloat16")).removeprefix("torch.")
    found = getattr(torch, named, None)
    if found not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"model {folder}: dtype must be auto, bfloat16, float16 or float32; got {named!r}")
    return found


def _shards(view: Mapping[str, TensorEntry], shard_bytes: int) -> Shards:
    groups: list[list[TensorEntry]] = [[]]
    size = 0
    for name in sorted(view):
        nbytes = plain_bytes(view[name])
        if groups[-1] and size + nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(view[name])
        size += nbytes
    if len(groups) == 1:
        return {ONLY_NAME: groups[0]}
    return {f"model-{place:05}-of-{len(groups):05}.safetensors": group for place, group in enumerate(groups, 1)}


def _source(view: Mapping[str, TensorEntry]) -> dict[str, list[int]]:
    """Size and time of change of every shard: what tells one checkpoint from another."""
    files = sorted({file for entry in view.values() for file in entry.files})
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _own_part(out: Path, plan: dict[str, Any]) -> Path:
    """The folder that grows: new, or of an interrupted run of the same checkpoint.

    Raises:
        ValueError: if something else bears its name.
    """
    part = out.with_name(f"{out.name}.part")
    if part.exists() and not (part / PLAN_NAME).is_file():
        raise ValueError(f"cannot write {out}: {part} is in the way and is not of an interrupted run")
    if part.exists() and json.loads((part / PLAN_NAME).read_text(encoding="utf-8")) != plan:
        shutil.rmtree(part)
    if not part.exists():
        part.mkdir()
        write_json(part / PLAN_NAME, plan)
    return part


def _write_shards(part: Path, shards: Shards, progress: Callable[[int, int], None]) -> None:
    done, total = 0, sum(plain_bytes(entry) for entries in shards.values() for entry in entries)
    for name, entries in shards.items():
        if (part / name).is_file():  # it got its name when it was complete
            done += sum(map(plain_bytes, entries))
            progress(done, total)
            continue
        with atomic_write(part / name, "wb") as file:
            head = ((entry.name, entry.dtype, tuple(entry.shape), plain_bytes(entry)) for entry in entries)
            file.write(safetensors_head(head))
            for entry in entries:
                for nbytes in _write_tensor(entry, file):
                    done += nbytes
                    progress(done, total)


def _write_tensor(entry: TensorEntry, file: IO[bytes]) -> Iterator[int]:
    """Write one tensor; gives the bytes of each piece when it is written."""
    if isinstance(entry, MadeEntry):
        yield file.write(entry.make())
        return
    if isinstance(entry, QuantisedEntry):
        plain = torch.empty(entry.shape[-2:], dtype=entry.torch_dtype())
        for number in range(entry.num_matrices):
            entry.read(number).expand(plain, is_transposed=entry.is_transposed)
            yield file.write(plain.view(torch.uint8).numpy())
        return
    with entry.file.open("rb") as source:
        source.seek(entry.offset)
        left = entry.nbytes
        while left:
            data = source.read(min(left, COPY_BYTES))
            if not data:
                raise OSError(f"{entry.file}: the file ends within {entry.name}; it was truncated while it was in use")
            left -= file.write(data)
            yield len(data)


def _is_weights(file: Path) -> bool:
    return ".safetensors" in file.name or file.suffix in (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what says that weights are quantised, or which file holds them."""
    gone = ("quantization_config", "compression_config", "transformers_weights")
    plain = {key: value for key, value in config.items() if key not in gone}
    parts = {key: value for key, value in plain.items() if isinstance(value, dict)}
    return plain | {key: {k: v for k, v in value.items() if k not in gone} for key, value in parts.items()}
