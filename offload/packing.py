"""A packed copy of all experts: one contiguous, block-aligned, checksummed record per expert, in one file.

`FILE` holds the records, `FILE.json` says where each one is, what is in it and its CRC-32. Packing can be interrupted
and resumed: what is finished stands in `FILE.part.json`.
"""

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

from routing.traces import write_json

from .checkpoint import TORCH_DTYPES, TensorEntry
from .layout import ExpertLayer, Parameter, Source
from .reading import Ticket
from .record import BLOCK_BYTES
from .store import ExpertStore, Slots

FORMAT, VERSION = "expertier-pack", 1
MAX_INDEX_BYTES = 256 << 20
DTYPE_NAMES = {name: stored for stored, name in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Pack:
    """A packed copy: the layers as a store reads them, and the CRC-32 of each expert of each layer."""

    layers: list[ExpertLayer]
    checksums: list[list[int]]


def fingerprint(entries: Mapping[str, TensorEntry]) -> dict[str, list[int]]:
    """What tells one checkpoint from another: size and time of change of its files."""
    files = sorted({entry.file for entry in entries.values()})
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def write_pack(
    model: Any,
    layers: Sequence[ExpertLayer],
    entries: Mapping[str, TensorEntry],
    target: Path,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Path:
    """Copy all experts of a model into `target`, going on where an interrupted run of the same checkpoint stopped.

    Args:
        model: the model or its skeleton, for conversions.
        layers: where its experts lie.
        entries: the checkpoint's tensors.
        target: the file to write; its index is written beside it when everything is on disk.
        progress: told the bytes of each expert written.
    """
    if not target.absolute().parent.is_dir():
        raise ValueError(f"cannot write {target}: the folder {target.absolute().parent} does not exist")
    part, state_file = _beside(target, ".part"), _beside(target, ".part.json")
    index = _describe(layers, fingerprint(entries))
    checksums = _resume(state_file, part, index)
    store = ExpertStore(model, layers, num_threads=2)
    try:
        with part.open("r+b" if checksums else "wb") as file:
            for layer, described in enumerate(index["layers"]):
                if layer < len(checksums):
                    progress(described["num_experts"] * described["record_bytes"])
                    continue
                checksums.append(_write_layer(store, layer, described, file, progress))
                file.flush()
                os.fsync(file.fileno())
                write_json(state_file, {**index, "checksums": checksums})
    finally:
        store.close()
    part.replace(target)
    write_json(_beside(target, ".json"), {**index, "checksums": checksums})
    state_file.unlink()
    return target


def read_pack(file: Path, layers: Sequence[ExpertLayer], entries: Mapping[str, TensorEntry]) -> Pack:
    """Open a packed copy of the checkpoint that `layers` and `entries` describe.

    Raises:
        ValueError: if it is damaged, or was made from another checkpoint.
    """
    index_file = _beside(file, ".json")
    for needed in (file, index_file):
        if not needed.is_file():
            raise ValueError(f"{needed}: no such file; make it with `expertier pack`")
    index = _read_index(index_file)
    expected = _describe(layers, fingerprint(entries))
    for key, message in (("layers", "holds other experts than"), ("source", "was made from other files than")):
        if index.get(key) != expected[key]:
            raise ValueError(f"{file} {message} this checkpoint's; make it again with `expertier pack`")
    last = expected["layers"][-1]
    size = last["offset"] + last["num_experts"] * last["record_bytes"]
    if file.stat().st_size != size:
        raise ValueError(f"{file}: has {file.stat().st_size} bytes instead of {size}; make it again")
    checksums = [[int(value) for value in layer] for layer in index["checksums"]]
    packed = [_packed_layer(file, layer, described) for layer, described in zip(layers, index["layers"], strict=True)]
    return Pack(packed, checksums)


def _write_layer(
    store: ExpertStore, layer: int, described: Mapping[str, Any], file: Any, progress: Callable[[int], None]
) -> list[int]:
    record, landed = store.records[layer], SimpleQueue[Ticket]()
    slots, checksums = Slots(1, record.slot_bytes), []
    for expert in range(record.layer.num_experts):
        _, shifts = store.read(layer, expert, 0, slots, landed)
        ticket = landed.get()
        if ticket.error is not None:
            raise OSError(f"reading expert {expert} of MoE layer {layer} failed: {ticket.error}") from ticket.error
        views = record.views(slots.slot(0), shifts)
        data = b"".join(
            views[parameter.name].reshape(-1).view(torch.uint8).numpy().tobytes()
            for parameter in record.layer.parameters
        )
        file.seek(described["offset"] + expert * described["record_bytes"])
        file.write(data.ljust(described["record_bytes"], b"\0"))
        checksums.append(zlib.crc32(data))
        progress(described["record_bytes"])
    return checksums


def _describe(layers: Sequence[ExpertLayer], source: Mapping[str, Any]) -> dict[str, Any]:
    described, offset = [], 0
    for layer in layers:
        record_bytes = -(-layer.expert_bytes // BLOCK_BYTES) * BLOCK_BYTES
        described.append(
            {
                "module": layer.module_name,
                "num_experts": layer.num_experts,
                "offset": offset,
                "record_bytes": record_bytes,
                "parameters": [
                    [parameter.name, str(parameter.dtype).removeprefix("torch."), list(parameter.shape)]
                    for parameter in layer.parameters
                ],
            }
        )
        offset += layer.num_experts * record_bytes
    return {"format": FORMAT, "version": VERSION, "source": dict(source), "layers": described}


def _packed_layer(file: Path, layer: ExpertLayer, described: Mapping[str, Any]) -> ExpertLayer:
    parameters, inside = [], 0
    for parameter in layer.parameters:
        count = parameter.nbytes // parameter.dtype.itemsize
        stored = DTYPE_NAMES[str(parameter.dtype).removeprefix("torch.")]
        entries = tuple(
            TensorEntry(
                f"{parameter.full_name}[{expert}]",
                file,
                described["offset"] + expert * described["record_bytes"] + inside,
                parameter.nbytes,
                stored,
                parameter.shape,
            )
            for expert in range(layer.num_experts)
        )
        source = Source(parameter.full_name, entries, is_fused=False)
        parameters.append(
            Parameter(
                parameter.name,
                parameter.full_name,
                parameter.shape,
                parameter.dtype,
                (source,),
                None,
                ((0, 0, 0, count),),
            )
        )
        inside += parameter.nbytes
    return ExpertLayer(layer.module_name, layer.num_experts, tuple(parameters))


def _resume(state_file: Path, part: Path, index: Mapping[str, Any]) -> list[list[int]]:
    """Checksums of the layers that an interrupted run finished; empty if it was another checkpoint's."""
    if not (state_file.is_file() and part.is_file()):
        return []
    state = _read_index(state_file)
    same = all(state.get(key) == index[key] for key in ("layers", "source"))
    return [list(layer) for layer in state["checksums"]] if same else []


def _read_index(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"{file}: too large for the index of a packed copy")
    try:
        index: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if index["format"] != FORMAT or index["version"] != VERSION:
            raise ValueError(f"format {index['format']!r} version {index['version']!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the index of a packed copy of version {VERSION}: {error}") from error
    return index


def _beside(file: Path, suffix: str) -> Path:
    return file.with_name(file.name + suffix)
