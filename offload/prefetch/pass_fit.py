"""Trains a predictor of whole passes from a trace with token ids, and says how good it is on rows it has not seen.

Shapes: T tokens, S positions of a window, L MoE layers, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import binary_cross_entropy_with_logits

from routing.traces import RoutingTrace

from ..cache.predicted import PredictedUse
from ..cache.simulate import simulate
from .pass_model import CONTEXT, PassModel, PassSizes
from .pass_predictor import PassPredictor
from .predictor import LIKELY_LOGIT, hot_TLE
from .predictor_fit import fit_predictor, precision_and_recall

WINDOWS, LEAST_STEPS, EPOCHS, RATE = 32, 300, 6, 3e-3
"""Windows of a step, steps at least, passes over a trace that is longer, and learning rate of AdamW; not tuned."""
CORRECTED_SHARE = 0.2
"""Of the rows, the last ones, on which corrections are fitted. On its own rows the transformer looks surer than it is;
other shares were not tried."""
EXPERTS_PER_SLOT, COMPARED = 4, ("lru", "learned", "belady")
"""Experts for each slot of the caches whose hit rates are compared, and the policies beside `predicted`."""


@dataclass(frozen=True, kw_only=True)
class PassScores:
    """How good a predictor is on rows that it has not seen.

    Args:
        before: precision and recall of the experts that are likelier than not, before the pass.
        top: share of the visited experts that are among as many likeliest ones as a token visits, before the pass.
        corrected: precision and recall by layers ahead, when the layers before are known.
        hit_rates: by policy, at a quarter of the slots; `predicted` keeps what the pass is expected to use.
    """

    before: tuple[float, float]
    top: float
    corrected: dict[int, tuple[float, float]]
    hit_rates: dict[str, float]


def fit_pass_predictor(
    trace: RoutingTrace, *, seed: int = 0, progress: Callable[[int], None] = lambda steps: None
) -> PassPredictor:
    """A transformer on the first rows, its corrections on the last ones; deterministic.

    Args:
        trace: with token ids.
        seed: of the start and of the order of windows.
        progress: told how many steps will have been taken in all, before each.

    Raises:
        ValueError: if the trace has no token ids, or too few rows.
    """
    split = int((1 - CORRECTED_SHARE) * trace.num_tokens)
    model = _fit_model(trace.rows(0, split), int(_tokens(trace).max()) + 1, seed, progress)
    rest = trace.rows(split)
    return PassPredictor(model, fit_predictor(rest, before_TLE=logits_TLE(model, rest), seed=seed))


def score(predictor: PassPredictor, trace: RoutingTrace) -> PassScores:
    """How good a predictor is on a trace."""
    logit_TLE, hot = logits_TLE(predictor.model, trace), hot_TLE(trace).astype(bool)
    is_guessed = logit_TLE >= LIKELY_LOGIT
    right, visited = float((is_guessed & hot).sum()), max(float(hot.sum()), 1.0)
    order = np.argsort(-logit_TLE, axis=-1).argsort(axis=-1)
    return PassScores(
        before=(right / max(float(is_guessed.sum()), 1.0), right / visited),
        top=float((hot & (order < hot.sum(axis=-1, keepdims=True))).sum()) / visited,
        corrected=precision_and_recall(predictor.corrections, trace, logit_TLE),
        hit_rates=_hit_rates(trace, logit_TLE),
    )


def logits_TLE(model: PassModel, trace: RoutingTrace) -> NDArray[np.float32]:
    """What a model says before each row's pass: it sees the row's token and those before it in the sequence."""
    token_T = _tokens(trace).astype(np.int64)
    out = np.zeros((trace.num_tokens, model.of.num_layers, model.of.num_experts), np.float32)
    windows = _windows(trace)
    for start in range(0, len(windows.row_NS), WINDOWS):
        row_BS, is_new_BS = (part[start : start + WINDOWS] for part in (windows.row_NS, windows.is_new_NS))
        out[row_BS[is_new_BS]] = model.logits(token_T[row_BS])[is_new_BS]
    return out


@dataclass(frozen=True, kw_only=True)
class _Windows:
    """Rows of a trace in windows of CONTEXT, which overlap by half within a sequence.

    Args:
        row_NS: row ids; the last one again where a sequence has no more.
        is_real_NS: whether it does.
        is_new_NS: whether no earlier window has that row; such a row looks back as far as the sequence, or half a
            window.
    """

    row_NS: NDArray[np.int64]
    is_real_NS: NDArray[np.bool_]
    is_new_NS: NDArray[np.bool_]


def _windows(trace: RoutingTrace) -> _Windows:
    order_T = np.argsort(trace.sequence_T, kind="stable")
    place_S = np.arange(CONTEXT)
    starts: list[int] = []
    ends: list[int] = []
    bounds = np.flatnonzero(np.diff(trace.sequence_T[order_T], prepend=-1, append=-1))
    for first, end in pairwise(bounds.tolist()):
        more = range(first, max(end - CONTEXT // 2, first + 1), CONTEXT // 2)
        starts += more
        ends += [end] * len(more)
    place_NS, end_N1 = np.array(starts)[:, None] + place_S, np.array(ends)[:, None]
    is_first_N1 = np.isin(place_NS[:, :1], bounds)
    is_real_NS = place_NS < end_N1
    return _Windows(
        row_NS=order_T[np.minimum(place_NS, end_N1 - 1)],
        is_real_NS=is_real_NS,
        is_new_NS=is_real_NS & (is_first_N1 | (place_S >= CONTEXT // 2)),
    )


def _fit_model(trace: RoutingTrace, vocab_size: int, seed: int, progress: Callable[[int], None]) -> PassModel:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = PassModel(PassSizes(vocab_size=vocab_size, num_layers=trace.num_layers, num_experts=trace.num_experts))
    token_T, hot = torch.from_numpy(_tokens(trace).astype(np.int64)), torch.from_numpy(hot_TLE(trace))
    with torch.no_grad():
        model.head.bias.copy_(torch.logit(hot.mean(dim=0).clamp(1e-3, 1 - 1e-3)).flatten())
    windows = _windows(trace)
    row_NS, is_real_NS = torch.from_numpy(windows.row_NS), torch.from_numpy(windows.is_real_NS)
    steps = max(LEAST_STEPS, EPOCHS * len(row_NS) // WINDOWS)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        progress(steps)
        chosen = torch.randint(len(row_NS), (WINDOWS,), generator=generator)
        row_BS, is_real_BS = row_NS[chosen], is_real_NS[chosen]
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(model(token_T[row_BS])[is_real_BS], hot[row_BS[is_real_BS]])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def _tokens(trace: RoutingTrace) -> NDArray[np.int32]:
    if trace.token_T is None:
        raise ValueError(
            "this trace has no token ids, from which experts are predicted before a pass; record one with "
            "`expertier trace record`"
        )
    return trace.token_T


def _hit_rates(trace: RoutingTrace, logit_TLE: NDArray[np.float32]) -> dict[str, float]:
    """At a quarter of the slots: policies that know the past, prediction, and the bound."""
    slots = max(1, trace.num_experts // EXPERTS_PER_SLOT)
    rates = {name: found.hit_rate for name, found in simulate(trace, slots, policies=COMPARED).items()}
    hits = 0
    for layer in range(trace.num_layers):
        cache = PredictedUse(slots, trace.num_experts)
        for expert_K, logit_E in zip(trace.expert_TLK[:, layer].tolist(), logit_TLE[:, layer], strict=True):
            cache.expect(1 / (1 + np.exp(-logit_E)))
            hits += cache.access(list(dict.fromkeys(expert for expert in expert_K if expert >= 0)))
    visited = float(hot_TLE(trace).sum())
    return rates | {"predicted": hits / max(visited, 1.0)}
