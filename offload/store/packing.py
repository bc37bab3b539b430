"""A packed copy of all experts: one contiguous, block-aligned, checksummed record per expert, in one file.

`FILE` holds the records, `FILE.json` says where each one is and what is in it (see pack_index.py). Records may be
in any form of FORMS. Packing can be interrupted and resumed: what is finished stands in
`FILE.part.json`.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

import torch
from xxhash import xxh3_64_hexdigest

from routing.ground.expect import expect_folder, expect_name, expect_not_an_input

from ..checkpoint.experts import ExpertLayer
from ..checkpoint.model_folder import skeleton_of
from ..checkpoint.tensors import TensorEntry
from ..formats.catalogue import FORMS, form_in_place
from ..formats.form import Form
from ..formats.lossy.levelled import LevelledForm
from ..formats.lossy.low_bit import LowBitForm
from ..formats.lossy.ternary import TernaryForm
from ..formats.pack_index import (
    MAX_INDEX_BYTES,
    PackedLayer,
    PackedRecord,
    PackIndex,
    describe_parameters,
    rounded_up,
)
from ..formats.plain import PlainForm
from ..formats.quantised import packed_name
from ..formats.quantised_forms import QUANTISED_FORMS
from .reading import Ticket
from .store import ExpertStore, Slots

NEED_A_METHOD = (LowBitForm.name, LevelledForm.name, TernaryForm.name)
"""Forms that plain weights become only by rounding."""


@dataclass(frozen=True)
class Pack:
    """A packed copy: how each layer is stored in it, and the checksum of each expert of each layer.

    Of experts in levels, `level_checksums` and `level_errors` say more, for each expert and level.
    """

    forms: list[Form]
    checksums: list[list[str]]
    level_checksums: list[list[tuple[str, ...]]]
    level_errors: list[list[tuple[float, ...]]]

    @property
    def has_levels(self) -> bool:
        """Whether some experts can be read in part."""
        return any(isinstance(form, LevelledForm) for form in self.forms)

    def to_depth(self, depth_LE: Sequence[Sequence[int]]) -> "Pack":
        """The same copy, read to these levels; layers without levels stay as they are."""
        forms, checksums = list(self.forms), [*map(list, self.checksums)]
        for layer, form in enumerate(self.forms):
            if isinstance(form, LevelledForm):
                forms[layer] = form.to_depth(depth_LE[layer])
                levels = zip(self.level_checksums[layer], depth_LE[layer], strict=True)
                checksums[layer] = [found[depth - 1] for found, depth in levels]
        return replace(self, forms=forms, checksums=checksums)


def write_pack(
    path_or_id: str | Path,
    target: Path,
    *,
    is_compressed: bool = False,
    form: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Copy all experts of a model into `target`, going on where an interrupted run of the same checkpoint stopped.

    Args:
        path_or_id: a Hugging Face model folder with safetensors weights, or a model id.
        target: the file to write; its index is written beside it when everything is on disk.
        is_compressed: compress the layers that can be, without loss; short for `form="compressed"`.
        form: name in FORMS; layers that it does not suit are stored plainly. Default: plain experts are stored plainly,
            and quantised ones as the checkpoint stores them.
        progress: told after each expert how many bytes of the checkpoint's experts are done, and how many there are.

    Returns:
        `target`.

    Raises:
        ValueError: if the form is unknown, the experts cannot be offloaded, or writing would replace anything but an
            earlier packed copy of this model.
    """
    expect_folder(target)
    wanted = form or ("compressed" if is_compressed else None)
    if wanted is not None:
        expect_name(wanted, FORMS, "stored form")
    model, entries, layers = skeleton_of(path_or_id)
    sources = [form_in_place(layer) for layer in layers]
    wanted = _expect_stored(wanted, sources, str(path_or_id))
    expect_own(target, layers, entries)
    done, total = 0, sum(source.layer.num_experts * source.expert_bytes for source in sources)

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    part, state_file = beside(target, ".part"), beside(target, ".part.json")
    index = _resume(state_file, part, PackIndex.of(entries, wanted), layers)
    store = ExpertStore(model, sources, num_threads=2)
    try:
        with part.open("r+b" if index.layers else "wb") as file:
            for source in sources[: len(index.layers)]:
                advance(source.layer.num_experts * source.expert_bytes)
            for number in range(len(index.layers), len(layers)):
                file.seek(index.end)
                index.layers.append(_write_layer(store, number, file, advance, FORMS[wanted]))
                _secure(file, index, state_file)
    finally:
        store.close()
    # The index comes first: after a crash between the two lines `target` is missing, or an older copy that the index
    # does not fit, and `read_pack` refuses it. The next run finds its own part and index, and needs these lines only.
    # In the other order it would find a `target` without an index, and refuse to write over somebody else's file.
    index.write(beside(target, ".json"))
    part.replace(target)
    state_file.unlink()
    return target


def _secure(file: BinaryIO, index: PackIndex, state_file: Path) -> None:
    """Records reach the disk before the index that names them; else a power cut leaves an index of nothing."""
    file.truncate()
    file.flush()
    os.fsync(file.fileno())
    index.write(state_file)


def read_pack(file: Path, layers: Sequence[ExpertLayer], entries: Mapping[str, TensorEntry]) -> Pack:
    """Open a packed copy of the checkpoint that `layers` and `entries` describe.

    Raises:
        ValueError: if it is damaged, or was made from another checkpoint.
    """
    index_file = beside(file, ".json")
    for needed in (file, index_file):
        if not needed.is_file():
            raise ValueError(f"{needed}: no such file; make it with `expertier pack`")
    index = PackIndex.read(index_file)
    if len(index.layers) != len(layers) or not all(map(PackedLayer.holds, index.layers, layers)):
        raise ValueError(f"{file} holds other experts than this checkpoint's; make it again with `expertier pack`")
    if index.source != PackIndex.of(entries).source:
        raise ValueError(f"{file} was made from other files than this checkpoint's; pack it again")
    if file.stat().st_size != index.end:
        raise ValueError(f"{file}: has {file.stat().st_size} bytes instead of {index.end}; make it again")
    return Pack(
        [packed.opened(file, layer, index.end) for packed, layer in zip(index.layers, layers, strict=True)],
        [[record.xxh3 for record in packed.records] for packed in index.layers],
        [[record.level_xxh3 or () for record in packed.records] for packed in index.layers],
        [[record.level_errors or () for record in packed.records] for packed in index.layers],
    )


def expect_own(target: Path, layers: Sequence[ExpertLayer], entries: Mapping[str, TensorEntry]) -> None:
    """Refuse a target that replaces a file of the checkpoint, or anything but a packed copy of the same model.

    Raises:
        ValueError: if it does.
    """
    index_file, state_file = beside(target, ".json"), beside(target, ".part.json")
    for file in (target, index_file, beside(target, ".part"), state_file):
        expect_not_an_input(file, *{shard for entry in entries.values() for shard in entry.files})
        expect_folder(file)
    if (target.exists() or index_file.exists()) and not _is_pack_of(index_file, layers):
        raise ValueError(
            f"cannot write {target}: {target if target.exists() else index_file} is there and is no packed copy of "
            "this model; choose another --out"
        )
    if state_file.exists() and not _is_pack_of(state_file, layers):
        raise ValueError(
            f"cannot write {target}: {state_file} is in the way and is not of an interrupted `pack` of this model"
        )


def _is_pack_of(index_file: Path, layers: Sequence[ExpertLayer]) -> bool:
    """Whether this is the index of a packed copy, of whatever version, of a model with these layers."""
    if not index_file.is_file() or index_file.stat().st_size > MAX_INDEX_BYTES:
        return False
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
        packed = [layer["module"] for layer in index["layers"]]
    except (ValueError, KeyError, TypeError):
        return False
    names = [layer.module_name for layer in layers]
    return index.get("format") == "expertier-pack" and packed == names[: len(packed)]


def _expect_stored(wanted: str | None, sources: Sequence[Form], model: str) -> str:
    """The form to write: as the checkpoint stores its first quantised layer, if none is wanted.

    Raises:
        ValueError: if a quantised form is wanted in which nothing is stored: packing never quantises.
    """
    stored = list(dict.fromkeys(source.name for source in sources if source.name in QUANTISED_FORMS))
    if wanted is None:
        return stored[0] if stored else "plain"
    if (wanted in QUANTISED_FORMS and wanted not in stored) or wanted in NEED_A_METHOD:
        has = f"its experts are {', '.join(stored)}" if stored else "its experts are plain"
        raise ValueError(
            f"{model} stores no experts as {wanted} ({has}), and packing does not quantise "
            "without a method; `expertier pack --method` does"
        )
    return wanted


def _chosen(source: Form, wanted: type[Form], views: Mapping[str, Any]) -> type[Form]:
    """The form of a layer: what is wanted, if that suits it; quantised layers are expanded only if that is wanted."""
    if wanted.name in QUANTISED_FORMS:
        return QUANTISED_FORMS[packed_name(source.layer)] if source.name in QUANTISED_FORMS else PlainForm
    return wanted if wanted.suits(source.layer, views) else PlainForm


def _write_layer(
    store: ExpertStore, number: int, file: BinaryIO, progress: Callable[[int], None], wanted: type[Form]
) -> PackedLayer:
    """Write one layer's records from the file's position on."""
    source, landed = store.forms[number], SimpleQueue[Ticket]()
    layer, records, chosen = source.layer, list[PackedRecord](), wanted
    slots = Slots(1, source.slot_bytes)
    room = None if wanted.name in QUANTISED_FORMS or not source.is_expanded else room_of(layer)
    for expert in range(layer.num_experts):
        _, shifts = store.read(number, expert, 0, slots, landed)
        ticket = landed.get()
        if ticket.error is not None:
            raise OSError(f"reading expert {expert} of MoE layer {number} failed: {ticket.error}") from ticket.error
        views: Mapping[str, Any] = source.views(slots.slot(0), shifts)
        if room is not None:
            source.expand(views, room)
            views = room
        if expert == 0:
            chosen = _chosen(source, wanted, views)
        data = b"".join(chosen.encode(layer, views))
        records.append(PackedRecord(offset=file.tell(), nbytes=len(data), xxh3=xxh3_64_hexdigest(data)))
        file.write(data.ljust(rounded_up(len(data)), b"\0"))
        progress(source.expert_bytes)
    return PackedLayer(
        module=layer.module_name, parameters=describe_parameters(layer), encoding=chosen.name, records=tuple(records)
    )


def room_of(layer: ExpertLayer) -> dict[str, torch.Tensor]:
    """A matrix for each parameter of one expert."""
    return {parameter.name: torch.empty(parameter.shape, dtype=parameter.dtype) for parameter in layer.parameters}


def _resume(state_file: Path, part: Path, fresh: PackIndex, layers: Sequence[ExpertLayer]) -> PackIndex:
    """What an interrupted run finished; nothing if it was another checkpoint's, or packed differently."""
    if not (state_file.is_file() and part.is_file()):
        return fresh
    state = PackIndex.read(state_file)
    is_same = state.begins_like(fresh, layers) and part.stat().st_size >= state.end
    return state if is_same else fresh


def beside(file: Path, suffix: str) -> Path:
    """The file that belongs to a packed copy, by its ending."""
    return file.with_name(file.name + suffix)
