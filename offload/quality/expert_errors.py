"""How far the experts of one model are from those of another: outputs for the same inputs, expert by expert.

Inputs are those that the reference's experts saw while it read a text. One expert of each model is in memory at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..formats.form import Form
from ..lowbit.inputs import RecordedInputs
from ..lowbit.measuring import MEASURED_ROWS, expert_output
from ..lowbit.reading import ExpertReader
from ..lowbit.writing import calibration_of, expert_module


@dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """Errors of one layer.

    Args:
        error: squared error of the experts' outputs as a share of their squares, each row weighted by its routing
            weight squared.
        error_E: the same of each expert; None where the text never reached it.
        rows_E: tokens that reached each expert.
    """

    error: float
    error_E: list[float | None]
    rows_E: list[int]


def expert_errors(
    reference: ExpertReader,
    other: ExpertReader,
    forms: Sequence[Form],
    inputs: RecordedInputs,
    progress: Callable[[int], None] = lambda layer: None,
) -> list[LayerErrors]:
    """Compare the experts of two models of the same shapes.

    Args:
        reference: reads the experts that are right.
        other: reads those that are judged.
        forms: of the reference; for the shapes.
        inputs: what the reference's experts saw.
        progress: told the number of each layer.
    """
    found = []
    for layer, form in enumerate(forms):
        about = expert_module(reference.model, form.layer)
        squares, wholes, error_E, rows_E = 0.0, 0.0, list[float | None](), list[int]()
        for expert in range(form.layer.num_experts):
            calibration = calibration_of(inputs, about, layer, expert, most=MEASURED_ROWS)
            assert calibration is not None
            rows_E.append(calibration.rows.num_seen)
            if not rows_E[-1]:
                error_E.append(None)
                continue
            with torch.no_grad():
                _, right_ND = expert_output(about, reference.matrices(layer, expert), calibration)
                _, got_ND = expert_output(about, other.matrices(layer, expert), calibration)
            # rows are a random part of those that there were, so each stands for several
            cost_N = calibration.rows.weight_N.square() * (rows_E[-1] / len(right_ND))
            square = float(((got_ND - right_ND).square().sum(-1) * cost_N).sum())
            whole = float((right_ND.square().sum(-1) * cost_N).sum())
            error_E.append(square / whole if whole else 0.0)
            squares, wholes = squares + square, wholes + whole
        found.append(LayerErrors(error=squares / wholes if wholes else 0.0, error_E=error_E, rows_E=rows_E))
        progress(layer)
    return found
