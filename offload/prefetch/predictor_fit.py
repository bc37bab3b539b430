"""Trains a `TrainedPredictor` from a trace, and says how good it is on rows that it has not seen."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import binary_cross_entropy_with_logits

from routing.traces import RoutingTrace

from .predictor import AHEAD, LIKELY_LOGIT, SOURCES, TrainedPredictor, hot_TLE, inputs_TV

EPOCHS, LEAST_STEPS, BATCH, RATE = 4, 200, 1024, 1e-2
"""Passes over the trace, steps at least (short traces get more passes), rows of a step, learning rate of Adam. 40,000
rows of 24 layers took 9 s (experiments/records/2026-11-21_offload-speed); other values have no record."""


def fit_predictor(
    trace: RoutingTrace,
    *,
    before_TLE: NDArray[np.float32] | None = None,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> TrainedPredictor:
    """Logistic regressions by Adam; deterministic.

    Args:
        trace: at least two rows and two layers.
        before_TLE: logits of a predictor that is to be corrected, on rows that it was not trained on; None if there is
            none.
        seed: orders the rows; the same seed gives the same predictor.
        progress: called after each of the L * A regressions.
    """
    if trace.num_layers < 2 or len(trace.expert_TLK) < 2:
        raise ValueError("a predictor needs a trace of at least two layers and two rows")
    L, E, A = trace.num_layers, trace.num_experts, len(AHEAD)
    weight_ALVE = np.zeros((A, L, SOURCES * E, E), np.float32)
    bias_ALE = np.full((A, L, E), -20.0, np.float32)
    scale_AL = np.zeros((A, L), np.float32)
    hot, is_first_T = hot_TLE(trace), _is_first_T(trace)
    generator = torch.Generator().manual_seed(seed)
    for place, ahead in enumerate(AHEAD):
        for layer in range(L):
            if layer >= ahead:
                x_TV = torch.from_numpy(inputs_TV(hot, is_first_T, layer, ahead))
                y_TE = torch.from_numpy(np.ascontiguousarray(hot[:, layer]))
                before_TE = None if before_TLE is None else torch.from_numpy(before_TLE[:, layer])
                fitted = _regress(x_TV, y_TE, before_TE, generator)
                weight_ALVE[place, layer], bias_ALE[place, layer], scale_AL[place, layer] = fitted
            progress()
    return TrainedPredictor(weight_ALVE, bias_ALE, scale_AL)


def precision_and_recall(
    predictor: TrainedPredictor, trace: RoutingTrace, before_TLE: NDArray[np.float32] | None = None
) -> dict[int, tuple[float, float]]:
    """Per distance: the share of guessed experts that are visited, and of visited experts that are guessed.

    Args:
        before_TLE: logits of the predictor that it corrects.
    """
    hot, is_first_T, found = hot_TLE(trace), _is_first_T(trace), {}
    for place, ahead in enumerate(AHEAD):
        right = guessed = visited = 0.0
        for layer in range(ahead, trace.num_layers):
            x_TV = inputs_TV(hot, is_first_T, layer, ahead)
            logit_TE = x_TV @ predictor.weight_ALVE[place, layer] + predictor.bias_ALE[place, layer]
            if before_TLE is not None:
                logit_TE += predictor.scale_AL[place, layer] * before_TLE[:, layer]
            is_guessed_TE = logit_TE >= LIKELY_LOGIT
            right += float((is_guessed_TE * hot[:, layer]).sum())
            guessed += float(is_guessed_TE.sum())
            visited += float(hot[:, layer].sum())
        found[ahead] = (right / max(guessed, 1.0), right / max(visited, 1.0))
    return found


def _regress(
    x_TV: torch.Tensor, y_TE: torch.Tensor, before_TE: torch.Tensor | None, generator: torch.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    weight_VE = torch.zeros(x_TV.shape[1], y_TE.shape[1], requires_grad=True)
    scales: list[torch.Tensor] = []
    if before_TE is None:
        bias_E = torch.logit(y_TE.mean(dim=0).clamp(1e-4, 1 - 1e-4)).requires_grad_()
    else:
        bias_E = torch.zeros(y_TE.shape[1], requires_grad=True)
        scales = [torch.ones((), requires_grad=True)]
    optimizer = torch.optim.Adam([weight_VE, bias_E, *scales], RATE)
    for _ in range(max(EPOCHS, LEAST_STEPS * BATCH // len(x_TV))):
        for row_N in torch.randperm(len(x_TV), generator=generator).split(BATCH):  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            logit_NE = x_TV[row_N] @ weight_VE + bias_E
            if before_TE is not None:
                logit_NE = logit_NE + scales[0] * before_TE[row_N]
            binary_cross_entropy_with_logits(logit_NE, y_TE[row_N]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return weight_VE.detach().numpy(), bias_E.detach().numpy(), sum(scale.item() for scale in scales)


def _is_first_T(trace: RoutingTrace) -> NDArray[np.bool_]:
    is_first_T = np.ones(len(trace.sequence_T), bool)
    is_first_T[1:] = trace.sequence_T[1:] != trace.sequence_T[:-1]
    return is_first_T
