"""Writes a packed copy whose experts are quantised, one expert at a time; a run that was killed goes on.

`FILE.part` grows by a record for each expert, and `FILE.part.lowbit` says which are complete. Memory holds one expert.
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from xxhash import xxh3_64_hexdigest

from ..checkpoint.experts import ExpertLayer, weight_names
from ..codes.levels import LevelledScheme
from ..codes.schemes import Scheme
from ..codes.ternary import encode
from ..formats.form import Form
from ..formats.lossy import levelled
from ..formats.lossy.levelled import LevelledForm
from ..formats.lossy.low_bit import DTYPE_NAMES, LowBitForm, SchemeNames, record_of, scheme_list, stored_shape
from ..formats.lossy.ternary import TernaryForm
from ..formats.lossy.ternary import record_of as ternary_record
from ..formats.pack_index import PackedLayer, PackedRecord, PackIndex, describe_parameters, rounded_up
from ..formats.quantised import packed_name
from ..formats.quantised_forms import QUANTISED_FORMS
from ..store.packing import NEED_A_METHOD, beside
from .expert import Calibration, ExpertModule, QuantisedExpert, quantise_expert, ternary_expert
from .inputs import MOST_ROWS, RecordedInputs
from .journal import Journal
from .reading import ExpertReader
from .usage import Usage

LayerSchemes = Sequence[SchemeNames]
"""Of each expert of a layer; empty leaves a layer as it is stored."""


@dataclass(frozen=True, eq=False)
class Work:
    """What is to be quantised, and how.

    Args:
        model: the model's skeleton.
        sources: how each layer is stored.
        schemes_L: what each layer becomes.
        method: one of METHODS.
        inputs: what the experts see; None if the method does not ask.
        recipe: of the index: what was asked for.
        levels: becomes of the experts that are not quantised yet, in place of schemes.
        usage: how much each expert counts; orders levels by what they gain.
        is_ternary: whether experts that are not quantised yet become ternary, in place of schemes.
    """

    model: Any
    sources: Sequence[Form]
    schemes_L: Sequence[LayerSchemes]
    method: str
    inputs: RecordedInputs | None
    recipe: dict[str, Any]
    levels: LevelledScheme | None = None
    usage: Usage | None = None
    is_ternary: bool = False

    def form_of(self, layer: int) -> str:
        """Name of the form that a layer's experts are written in."""
        source = self.sources[layer]
        if source.name == "plain" and self.levels is not None:
            return LevelledForm.name
        if source.name == "plain" and self.is_ternary:
            return TernaryForm.name
        if self.schemes_L[layer]:
            return LowBitForm.name
        return packed_name(source.layer) if source.name in QUANTISED_FORMS else source.name


def is_transposed_in(model: Any, layer: ExpertLayer) -> bool:
    """Whether the model's parameters of a layer have inputs as rows."""
    return bool(model.get_submodule(layer.module_name).is_transposed)


def expert_module(model: Any, layer: ExpertLayer) -> ExpertModule:
    """What computing a layer's experts needs besides their matrices."""
    module = model.get_submodule(layer.module_name)
    up_name, down_name = weight_names(module)
    down = next(parameter for parameter in layer.parameters if parameter.name == down_name)
    return ExpertModule.of(module, up_name, down_name, stored_shape(down, is_transposed=module.is_transposed)[1])


def calibration_of(
    inputs: RecordedInputs | None, about: ExpertModule, layer: int, expert: int, most: int = MOST_ROWS
) -> Calibration | None:
    """What is known of an expert's inputs, at most `most` of them."""
    if inputs is None:
        return None
    return Calibration(inputs.rows(layer, expert, most), inputs.bias(layer, about.up_name, expert), inputs.num_tokens)


def write_low_bit(
    target: Path, work: Work, index: PackIndex, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, int]:
    """Write a packed copy.

    Args:
        target: the file; its index goes beside it.
        work: what to do.
        index: of the checkpoint, without layers.
        progress: told after each expert how many are done, and how many there are.

    Returns:
        How many experts each method quantised; `stored` are copied as they were.
    """
    experts = [
        (layer, expert) for layer, source in enumerate(work.sources) for expert in range(source.layer.num_experts)
    ]
    part = beside(target, ".part")
    plan = {"source": index.source, "recipe": work.recipe, "schemes": [[*map(list, layer)] for layer in work.schemes_L]}
    plan["levels"] = work.levels and work.levels.name
    part.touch()
    reader = ExpertReader(work.model, work.sources)
    try:
        with part.open("r+b") as file:
            journal = Journal(beside(target, ".part.lowbit"), plan, lambda: _secure(file))
            journal.keep(_whole(part, journal.done))
            try:
                for layer, expert in experts[len(journal.done) :]:
                    file.seek(_end(journal.done))
                    data, about = _record(work, reader, layer, expert)
                    journal.append({**_written(file, data), **about})
                    progress(len(journal.done), len(experts))
            finally:
                journal.save()
            file.truncate(_end(journal.done))
    finally:
        reader.close()
    methods = Counter(str(each["method"]) for each in journal.done)
    _index(work, index, journal.done, methods).write(beside(target, ".json"))
    part.replace(target)
    journal.remove()
    return dict(methods)


def _record(work: Work, reader: ExpertReader, layer: int, expert: int) -> tuple[bytes, dict[str, Any]]:
    """The bytes of an expert, and what the journal says of them besides."""
    source, schemes = work.sources[layer], work.schemes_L[layer]
    if work.form_of(layer) == LevelledForm.name:
        return _record_in_levels(work, reader, layer, expert)
    if work.form_of(layer) == TernaryForm.name:
        return _ternary_record(work, reader, layer, expert)
    if not schemes:
        form = QUANTISED_FORMS.get(packed_name(source.layer)) if source.name in QUANTISED_FORMS else type(source)
        return b"".join(form.encode(source.layer, reader.views(layer, expert))), {"method": "stored"}
    quantised = quantised_expert(work, reader, layer, expert, schemes[expert])
    names = schemes[expert]
    matrices = [quantised.rounded[parameter.name].stored for parameter in source.layer.parameters]
    return record_of(matrices, names, scheme_list(schemes)), {"method": quantised.method}


def _ternary_record(work: Work, reader: ExpertReader, layer: int, expert: int) -> tuple[bytes, dict[str, Any]]:
    stored = work.sources[layer].layer
    about = expert_module(work.model, stored)
    with torch.no_grad():
        calibration = calibration_of(work.inputs, about, layer, expert)
        rounded, method = ternary_expert(about, reader.matrices(layer, expert), calibration)
    found = [rounded[parameter.name] for parameter in stored.parameters]
    return ternary_record([encode(each.sign_RC, each.low_R, each.high_R) for each in found]), {"method": method}


def _record_in_levels(work: Work, reader: ExpertReader, layer: int, expert: int) -> tuple[bytes, dict[str, Any]]:
    stored, scheme = work.sources[layer].layer, work.levels
    assert scheme is not None
    weights = reader.matrices(layer, expert)
    levels = {name: scheme.encode(w_OC) for name, w_OC in weights.items()}
    data = levelled.record_of(expert, [levels[parameter.name] for parameter in stored.parameters])
    squares = (work.usage or Usage()).squares(layer, stored.num_experts)
    share = float(squares[expert] / max(squares.mean(), 1e-30))
    ends = levelled.level_ends(stored, scheme, is_transposed=is_transposed_in(work.model, stored))
    errors = [
        share * sum(_relative_error(scheme, levels[name][: level + 1], w_OC) for name, w_OC in weights.items())
        for level in range(scheme.levels)
    ]
    checksums = [xxh3_64_hexdigest(data[:end]) for end in ends]
    return data[: ends[-1]], {"method": scheme.kind, "level_xxh3": checksums, "level_errors": errors}


def _relative_error(scheme: LevelledScheme, levels: Sequence[Mapping[str, torch.Tensor]], w_OC: torch.Tensor) -> float:
    left_OC = scheme.decode(levels, *w_OC.shape) - w_OC
    return float(left_OC.square().sum() / w_OC.square().sum().clamp_min(1e-30))


def quantised_expert(work: Work, reader: ExpertReader, layer: int, expert: int, names: SchemeNames) -> QuantisedExpert:
    """One expert of a layer, quantised to schemes of these names."""
    source = work.sources[layer]
    about = expert_module(work.model, source.layer)
    schemes = {p.name: Scheme.named(name) for p, name in zip(source.layer.parameters, names, strict=True)}
    dtype = DTYPE_NAMES[str(source.layer.parameters[0].dtype).removeprefix("torch.")]
    with torch.no_grad():
        calibration = calibration_of(work.inputs, about, layer, expert)
        return quantise_expert(about, reader.matrices(layer, expert), schemes, work.method, dtype, calibration)


def _written(file: BinaryIO, data: bytes) -> dict[str, Any]:
    """Write a record where the file is."""
    offset = file.tell()
    file.write(data.ljust(rounded_up(len(data)), b"\0"))
    return {"offset": offset, "nbytes": len(data), "xxh3": xxh3_64_hexdigest(data)}


def _secure(file: BinaryIO) -> None:
    """Bring records to the disk, before the journal names them."""
    file.flush()
    os.fsync(file.fileno())


def _end(done: Sequence[Mapping[str, Any]]) -> int:
    return rounded_up(done[-1]["offset"] + done[-1]["nbytes"]) if done else 0


def _whole(part: Path, done: Sequence[Mapping[str, Any]]) -> int:
    """How many records are in the file."""
    size = part.stat().st_size if part.exists() else 0
    return sum(rounded_up(each["offset"] + each["nbytes"]) <= size for each in done)


def _index(work: Work, index: PackIndex, done: Sequence[Mapping[str, Any]], methods: Counter[str]) -> PackIndex:
    index.recipe = {**work.recipe, "methods": dict(methods)}
    first = 0
    for number, (source, schemes) in enumerate(zip(work.sources, work.schemes_L, strict=True)):
        layer, form = source.layer, work.form_of(number)
        records = tuple(
            PackedRecord(**{key: value for key, value in each.items() if key != "method"})
            for each in done[first : first + layer.num_experts]
        )
        first += layer.num_experts
        index.layers.append(
            PackedLayer(
                module=layer.module_name,
                parameters=describe_parameters(layer),
                encoding=form,
                records=records,
                schemes=tuple(schemes) if schemes else None,
                levels=work.levels.name if work.levels is not None and form == LevelledForm.name else None,
                is_transposed=form in NEED_A_METHOD and is_transposed_in(work.model, layer),
            )
        )
    return index
