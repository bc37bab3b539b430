"""What each number of bits would cost: the error of an expert's output for every matrix and every form, measured.

Shapes: T tokens, N rows of one expert, D model width, C inputs of any matrix, O its outputs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..codes.schemes import Scheme
from ..formats.lossy.low_bit import DTYPE_NAMES, matrix_bytes
from .expert import FITS_ZEROS, Calibration, ExpertModule, quantise_expert
from .inputs import ExpertRows, RecordedInputs
from .journal import Journal
from .quantise import Source
from .reading import ExpertReader
from .usage import Usage
from .writing import calibration_of, expert_module, is_transposed_in

MEASURED_ROWS = 256
"""Inputs of an expert that errors are measured on; more change a mean square by a few percent."""
ASSUMED_ROWS = 64
"""Random inputs that stand for an expert's own where there are none."""


@dataclass(frozen=True)
class Option:
    """One way to store one matrix: what it takes and what it costs."""

    scheme: str
    nbytes: int
    cost: float


@dataclass(frozen=True)
class Unit:
    """One matrix of one expert, and the ways to store it."""

    layer: int
    expert: int
    parameter: str
    options: tuple[Option, ...]


def measure(
    source: Source,
    candidates: Sequence[tuple[str, int]],
    usage: Usage,
    sensitivity_L: Sequence[float],
    state_file: Path,
    method: str,
    inputs: RecordedInputs | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Unit]:
    """Measure every candidate for every matrix that is not quantised yet; a run that was killed goes on.

    The cost of a matrix is the sum over its tokens of the routing weight squared times the squared error of the
    expert's output, as a share of the layer's output, times the layer's sensitivity.

    Args:
        source: the model, not quantised, opened for reading.
        candidates: forms with their groups, see `Scheme.for_columns`.
        usage: how much each expert counts.
        sensitivity_L: what a unit of relative error in each layer costs.
        state_file: where finished experts are noted.
        method: `hqq` measures with zeros; all others as `rtn`, which takes a fraction of the time.
        inputs: what experts see; without it, random inputs of unit variance stand for them.
        progress: told how many experts are done, and how many there are.
    """
    plan: dict[str, Any] = {
        "source": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in _files(source)],
        "candidates": [list(each) for each in candidates],
        "method": method,
        "inputs": None if inputs is None else inputs.about,
    }
    journal = Journal(state_file, plan)
    pending = [
        (layer, expert)
        for layer, form in enumerate(source.forms)
        if form.name == "plain"
        for expert in range(form.layer.num_experts)
    ]
    reader = ExpertReader(source.model, source.forms)
    try:
        for layer, expert in pending[len(journal.done) :]:
            journal.append(_measured(source, reader, candidates, method, inputs, layer, expert))
            progress(len(journal.done), len(pending))
    finally:
        journal.save()
        reader.close()
    return list(_units(source, journal.done, pending, usage, sensitivity_L))


def _files(source: Source) -> list[Path]:
    return sorted({file for form in source.forms for file in form.files})


def _measured(
    source: Source,
    reader: ExpertReader,
    candidates: Sequence[tuple[str, int]],
    method: str,
    inputs: RecordedInputs | None,
    layer: int,
    expert: int,
) -> dict[str, Any]:
    """Mean squared output of an expert, and mean squared error of each matrix in each form."""
    stored = source.layers[layer]
    about = expert_module(source.model, stored)
    weights = reader.matrices(layer, expert)
    calibration = calibration_of(inputs, about, layer, expert, most=MEASURED_ROWS)
    if calibration is None or calibration.rows.num_seen == 0:
        columns = weights[about.up_name].shape[1]
        generator = torch.Generator().manual_seed(layer * 65536 + expert)
        x_NC = torch.randn(ASSUMED_ROWS, columns, generator=generator)
        calibration = Calibration(ExpertRows(x_NC, torch.ones(ASSUMED_ROWS), 0), 0.0, 0)
    dtype = DTYPE_NAMES[str(stored.parameters[0].dtype).removeprefix("torch.")]
    with torch.no_grad():
        hidden_NF, out_ND = expert_output(about, weights, calibration)
        errors: dict[str, dict[str, float]] = {name: {} for name in weights}
        for form, group in candidates:
            has_zero, by = method in FITS_ZEROS, method if method in FITS_ZEROS else "rtn"
            schemes = {
                name: Scheme.for_columns(form, w_OC.shape[1], group, has_zero=has_zero)
                for name, w_OC in weights.items()
            }
            rounded = quantise_expert(about, weights, schemes, by, dtype).rounded
            up_OC, down_OC = (rounded[name].weight_RC for name in (about.up_name, about.down_name))
            _, by_up_ND = expert_output(about, {**weights, about.up_name: up_OC}, calibration)
            by_down_ND = hidden_NF @ down_OC.T
            for name, got_ND in ((about.up_name, by_up_ND), (about.down_name, by_down_ND)):
                errors[name][schemes[name].name] = _mean_square(got_ND - out_ND, calibration.rows.weight_N)
    return {"output": _mean_square(out_ND, calibration.rows.weight_N), "errors": errors}


def expert_output(
    about: ExpertModule, weights: Mapping[str, torch.Tensor], calibration: Calibration
) -> tuple[torch.Tensor, torch.Tensor]:
    """What an expert makes of its inputs, without the bias of its second product: `[N, F]` and `[N, D]`, float32."""
    hidden_NF = about.gate(calibration.rows.x_NC @ weights[about.up_name].T + calibration.up_bias)
    return hidden_NF, hidden_NF @ weights[about.down_name].T


def _mean_square(value_ND: torch.Tensor, weight_N: torch.Tensor) -> float:
    """The mean over rows, each weighted by its routing weight squared."""
    square_N = weight_N.square()
    return float((value_ND.square().sum(-1) * square_N).sum() / square_N.sum().clamp_min(1e-30))


def _units(
    source: Source,
    done: Sequence[Mapping[str, Any]],
    pending: Sequence[tuple[int, int]],
    usage: Usage,
    sensitivity_L: Sequence[float],
) -> Iterator[Unit]:
    squares = {layer: usage.squares(layer, source.layers[layer].num_experts) for layer, _ in pending}
    energy = dict.fromkeys(squares, 0.0)
    for (layer, expert), found in zip(pending, done, strict=True):
        energy[layer] += found["output"] * squares[layer][expert]
    for (layer, expert), found in zip(pending, done, strict=True):
        factor = sensitivity_L[layer] * squares[layer][expert] / max(energy[layer], 1e-30)
        is_transposed = is_transposed_in(source.model, source.layers[layer])
        for parameter in source.layers[layer].parameters:
            options = tuple(
                Option(name, matrix_bytes(parameter, Scheme.named(name), is_transposed=is_transposed), factor * error)
                for name, error in found["errors"][parameter.name].items()
            )
            yield Unit(layer, expert, parameter.name, options)
