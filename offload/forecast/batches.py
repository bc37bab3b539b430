"""Which batch gives the most tokens per second within a memory budget, and how many experts stay beside it.

More sequences share the reads of an expert and of weights outside experts. They also hold more keys and values, which
take memory from expert slots, and ask for more distinct experts. Recorded routing says how many (MoE-Lens,
arXiv:2504.09345, asks the same of formulas). Shapes: A steps, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace

from ..runtime.options import DEFAULT_POLICY
from .fit import fit
from .steps import StepRates, forecast_steps

Integer = NDArray[np.int64]
MOST_STEPS = 192  # that are replayed; a quarter of them fills the cache and does not count. Other numbers untried
WARM_SHARE = 4


@dataclass(frozen=True, kw_only=True)
class BatchForecast:
    """What a batch would do within a budget.

    Args:
        batch: sequences that decode together.
        chunk: tokens of a prompt that each step reads beside them; 0 for none.
        kv_bytes: room for keys and values of all sequences.
        num_slots: expert slots of each layer; empty if the batch does not fit.
        hit_rate: share of the experts that a step uses that are in slots, by the default policy.
        step_s: seconds of the mean step.
        attention_s: of them, reading keys and values of sequences that are half full.
        tokens_per_second: decoded ones.
        reason: why it does not fit; empty where it does.
    """

    batch: int
    chunk: int
    kv_bytes: int
    num_slots: tuple[int, ...] = ()
    hit_rate: float = 0.0
    step_s: float = 0.0
    attention_s: float = 0.0
    tokens_per_second: float = 0.0
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "num_slots": list(self.num_slots)}


def forecast_batches(
    path_or_id: str | Path,
    trace: RoutingTrace,
    rates: StepRates,
    batches: Sequence[int],
    *,
    context: int,
    chunk: int = 0,
    **options: Any,
) -> list[BatchForecast]:
    """Predict each batch: slots that its keys and values leave, and steps of recorded routing with these slots.

    Args:
        path_or_id: as for `fit`.
        trace: recorded routing of the model.
        rates: of this machine, measured for `step_rows(batches, chunk)`.
        batches: numbers of sequences.
        context: tokens that each sequence may come to.
        chunk: tokens of a prompt that each step reads beside the sequences.
        options: of `fit`, such as `cpu_memory`.

    Raises:
        ValueError: if the trace is too short for a batch, or of a model of another shape.
    """
    return [_forecast(path_or_id, trace, rates, batch, context, chunk, options) for batch in batches]


def best_batch(found: Sequence[BatchForecast]) -> BatchForecast | None:
    """The one with the most tokens per second, the smallest of equals; None if none fits."""
    fitting = [one for one in found if one.num_slots]
    return max(fitting, key=lambda one: (one.tokens_per_second, -one.batch), default=None)


def step_rows(batches: Sequence[int], chunk: int) -> list[int]:
    """Rows of a step with each of these batches."""
    return [batch + chunk for batch in batches]


def lanes(trace: RoutingTrace, batch: int, chunk: int = 0) -> Integer:
    """Rows of each step: sequences side by side, then the next tokens of a prompt. [A, T].

    The trace is cut into `batch` stretches that decode together, and one of prompts behind them.

    Raises:
        ValueError: if the trace has fewer than two steps of so many rows.
    """
    steps = min(MOST_STEPS, trace.num_tokens // (batch + chunk))
    if steps < 2:
        raise ValueError(
            f"the trace has {trace.num_tokens} rows; two steps of {batch} sequences"
            f"{f' and {chunk} tokens of a prompt' if chunk else ''} need {2 * (batch + chunk)}"
        )
    decoding = trace.num_tokens - steps * chunk
    starts = np.arange(batch) * (decoding // batch)
    row_AB = starts + np.arange(steps)[:, None]
    return np.hstack([row_AB, decoding + np.arange(steps * chunk).reshape(steps, chunk)])


def _forecast(
    path_or_id: str | Path,
    trace: RoutingTrace,
    rates: StepRates,
    batch: int,
    context: int,
    chunk: int,
    options: dict[str, Any],
) -> BatchForecast:
    sequences = batch + (chunk > 0)  # the prompt that is read holds room, too
    fitted = fit(path_or_id, context=sequences * context, **options)
    fitted.expect_shape(trace)
    told = {"batch": batch, "chunk": chunk, "kv_bytes": fitted.needs.kv_bytes}
    if fitted.plan is None:
        return BatchForecast(**told, reason=fitted.shortfall or "")
    row_AT = lanes(trace, batch, chunk)
    said = forecast_steps(
        fitted,
        trace,
        row_AT,
        rates,
        policy=DEFAULT_POLICY,
        warm=len(row_AT) // WARM_SHARE,
        held_tokens=sequences * context // 2,
    )
    return BatchForecast(
        **told,
        num_slots=fitted.plan.num_slots,
        hit_rate=said.hit_rate,
        step_s=said.step_s,
        attention_s=said.attention_s,
        tokens_per_second=batch / said.step_s,
    )
