"""A packed copy of quantised experts as a checkpoint of compressed-tensors, which other engines load.

The bytes are the same: codes and scales of a record become tensors with the names of that format. Everything else of
the model is copied.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch

from routing.ground.expect import expect_new

from ..checkpoint.experts import ExpertLayer, Parameter
from ..checkpoint.location import local_folder, read_json
from ..checkpoint.model_folder import skeleton_of
from ..checkpoint.quantised.plain_copy import SHARD_BYTES, MadeEntry, write_copy
from ..checkpoint.tensors import TensorEntry, read_into
from ..codes.encoding import Encoding
from ..codes.schemes import Scheme
from ..codes.stored_matrix import StoredMatrix
from ..formats.lossy.low_bit import LowBitForm
from ..store.packing import read_pack

EXPERTS = r"re:.*\.experts\.\d+\..*"
"""What a config names as quantised; transformers looks for `experts` in it."""


def write_open_folder(
    path_or_id: str | Path,
    pack: Path,
    out: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write a checkpoint folder whose experts are those of a packed copy; goes on after the last complete file.

    Args:
        path_or_id: the model that was packed.
        pack: the packed copy.
        out: the folder to write; must not exist.
        shard_bytes: size of a file at most.
        progress: told after each tensor how many bytes are written, and how many there are.

    Raises:
        ValueError: if experts differ in their schemes, or lie in the checkpoint in a way that has no name in
            compressed-tensors.
    """
    expect_new(out)
    folder = local_folder(path_or_id)
    _, entries, layers = skeleton_of(folder)
    forms = read_pack(pack, layers, entries).forms
    view = dict(entries)
    schemes: set[str] = set()
    for layer, form in zip(layers, forms, strict=True):
        if not isinstance(form, LowBitForm):
            raise ValueError(f"{pack}: {layer.module_name} was not quantised by us; its checkpoint is its open form")
        schemes |= {name for names in form.schemes_E for name in names}
        records = _Records(form)
        for parameter in layer.parameters:
            for plain in {entry.name for source in parameter.sources for entry in source.entry_E}:
                del view[plain]
            view |= {made.name: made for made in _tensors(layer, parameter, records)}
    if len(schemes) != 1:
        raise ValueError(
            f"{pack}: its experts are stored as {', '.join(sorted(schemes))}; loaders of compressed-tensors take one "
            "scheme for all experts, so only a packed copy of one form has an open folder"
        )
    (name,) = schemes
    if Scheme.named(name).has_zero:
        raise ValueError(
            f"{pack}: its codes have zeros, which transformers' loader of compressed-tensors leaves out without a "
            "word; for an open folder quantise by rtn, awq or gptq"
        )
    config = read_json(folder / "config.json", f"model {folder}: config.json")
    config = {**config, "quantization_config": quantization_config(Scheme.named(name))}
    return write_copy(folder, out, view, config, {"scheme": name}, shard_bytes=shard_bytes, progress=progress)


def quantization_config(scheme: Scheme) -> dict[str, Any]:
    """What config.json says of experts that are stored so."""
    weights: dict[str, Any] = {"num_bits": scheme.bits, "symmetric": True, "dynamic": False}
    weights["type"] = "int" if scheme.is_integer else "float"
    if scheme.group:
        weights |= {"strategy": "group", "group_size": scheme.group}
    else:
        weights |= {"strategy": "channel"}
    kind = {"mxfp4": "mxfp4-pack-quantized", "fp8": "float-quantized"}.get(scheme.form, "pack-quantized")
    if kind == "mxfp4-pack-quantized":
        weights["scale_dtype"] = "torch.uint8"
    group = {"targets": [EXPERTS], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": kind,
        "config_groups": {"group_0": {**group, "format": kind}},
        "ignore": [],
        "kv_cache_scheme": None,
    }


class _Records:
    """The records of a layer, the last of which stays in memory: tensors of one expert follow each other."""

    def __init__(self, form: LowBitForm) -> None:
        self.form = form
        self._expert, self._matrices = -1, dict[str, StoredMatrix]()

    def matrix(self, expert: int, name: str) -> StoredMatrix:
        """A matrix of an expert."""
        if expert != self._expert:
            entry = self.form.record_E[expert]
            raw = torch.empty(entry.nbytes, dtype=torch.uint8)
            with entry.file.open("rb", buffering=0) as stream:
                read_into(entry.file, stream.fileno(), entry.offset, memoryview(raw.numpy()))
            self.form.check(expert, raw)
            self._expert, self._matrices = expert, self.form.matrices(raw)
        return self._matrices[name]

    def rows(self, expert: int, name: str, role: str, first: int, count: int) -> bytes:
        """A part of some rows; each row has codes and scales of its own."""
        matrix = self.matrix(expert, name)
        part = matrix.parts[role].view(matrix.rows, -1)
        return part[first : first + count].numpy().tobytes()


def _tensors(layer: ExpertLayer, parameter: Parameter, records: _Records) -> list[MadeEntry]:
    """What takes the place of the plain tensors of a parameter."""
    made: list[MadeEntry] = []
    for number, inside, target, count in parameter.runs or ():
        source = parameter.sources[number]
        shape, columns = source.shape(), parameter.shape[-1]
        is_whole = len(shape) == 2 and shape[1] == columns and inside == 0 and count == prod(shape)
        if source.is_fused or not is_whole or records.form.is_transposed:
            break
        for expert in range(layer.num_experts):
            names = records.form.schemes_E[expert]
            scheme = Scheme.named(names[layer.parameters.index(parameter)])
            make = partial(_bytes_of, records, expert, parameter.name, target // columns)
            made += _named(source.entry_E[expert], scheme, shape, make)
    if not made or len(made) % len(parameter.runs or ()):
        raise ValueError(
            f"{parameter.full_name}: the checkpoint does not hold one plain matrix for each expert, and "
            "compressed-tensors has no names for anything else; use the packed copy"
        )
    return made


def _bytes_of(records: _Records, expert: int, name: str, first: int, role: str, count: int) -> bytes:
    return records.rows(expert, name, role, first, count)


def _named(entry: TensorEntry, scheme: Scheme, shape: tuple[int, ...], make: Callable[..., bytes]) -> list[MadeEntry]:
    rows, columns = shape
    encoding: Encoding = scheme.encoding(entry.dtype)
    sizes: Mapping[str, int] = encoding.part_bytes(rows, columns)
    across = encoding.grid(rows, columns)[1]
    codes, dtype, width = {
        "mxfp4": ("weight_packed", "U8", encoding.row_bytes(columns)),
        "fp8": ("weight", "F8_E4M3", columns),
    }.get(scheme.form, ("weight_packed", "I32", encoding.row_bytes(columns) // 4))
    stem = entry.name.removesuffix("weight")
    scale = "U8" if scheme.form == "mxfp4" else entry.dtype
    made = [
        MadeEntry(f"{stem}{codes}", entry.file, 0, sizes["codes"], dtype, (rows, width), partial(make, "codes", rows)),
        MadeEntry(
            f"{stem}weight_scale", entry.file, 0, sizes["scales"], scale, (rows, across), partial(make, "scales", rows)
        ),
    ]
    if dtype == "I32":
        shape_bytes = torch.tensor([rows, columns]).numpy().tobytes()
        made.append(MadeEntry(f"{stem}weight_shape", entry.file, 0, 16, "I64", (2,), lambda: shape_bytes))
    return made
