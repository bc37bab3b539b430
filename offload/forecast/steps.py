"""How fast a batch decodes: recorded routing step by step on paper, and what a step costs at this machine's rates.

`fit` knows one sequence and a hit rate. Here the misses of each layer's calls are those of the cache, and calls of
several rows cost what was measured for them. Rows of a step are tokens of several sequences, a chunk of a prompt
beside them, or both: experts are asked for by all of them at once. Attention reads what each sequence holds.
Shapes: A steps, T tokens, L MoE layers, E experts.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routing.ground.hardware import Hardware
from routing.traces import RoutingTrace

from ..cache.steps import ReplayedSteps, replay_steps
from ..memory.cost import layer_call_seconds, miss_seconds
from .calibrate import WIDTH, Products, calibrate, layer_seconds, square_matrices
from .fit import Fit

WEIGHTS = 24  # matrices of 8 MiB, more than the last cache holds
ROUNDS = 7  # of all numbers of rows in turns, so that a slow moment meets all. Other numbers were not tried


@dataclass(frozen=True)
class StepRates:
    """What was measured of a machine before any prediction.

    Args:
        machine: rates for one row, as `expertier calibrate` has them.
        ratios: how much longer products of n rows take than of one, at powers of two.
        call_s: by batch, seconds that a layer costs several rows more than one, besides reading weights.
    """

    machine: Hardware
    ratios: dict[int, float]
    call_s: dict[int, float]

    def ratio(self, rows: Any) -> Any:
        """The same for any numbers of rows, between those that were measured."""
        at, ratio = zip(*sorted(self.ratios.items()), strict=True)
        return np.interp(rows, at, ratio)


@dataclass(frozen=True)
class StepForecast:
    """What is expected of decoding some steps: share of asked experts in slots, and seconds of the mean step.

    `attention_s` of them go to reading keys and values.
    """

    hit_rate: float
    step_s: float
    attention_s: float = 0.0


def forecast_steps(
    fitted: Fit,
    trace: RoutingTrace,
    row_AT: NDArray[np.int64],
    rates: StepRates,
    *,
    policy: str,
    warm: int,
    held_tokens: int = 0,
) -> StepForecast:
    """Predict decoding of recorded routing, exact arithmetic, experts read from the disk.

    Args:
        fitted: the model with its budget.
        trace: recorded routing of the model.
        row_AT: rows of the trace that each step computes together.
        rates: of this machine, measured for batches of T.
        policy: cache policy by name.
        warm: first steps, which fill the cache and do not count.
        held_tokens: of all sequences together, whose keys and values a step reads.

    Raises:
        ValueError: if the model does not fit its budget, or the rates are of other batches.
    """
    batch = row_AT.shape[1]
    if fitted.plan is None:
        raise ValueError(f"nothing to predict: {fitted.shortfall}")
    if batch not in rates.call_s:
        raise ValueError(f"the rates are of batches {sorted(rates.call_s)}; got {batch}")
    paper = replay_steps(trace, row_AT, fitted.plan.num_slots, policy).after(warm)
    attention_s = held_tokens * fitted.kv_token_bytes / rates.machine.memory_bytes_per_s
    step_s = _step_seconds(fitted, paper, rates, batch, attention_s)
    return StepForecast(hit_rate=paper.hit_rate, step_s=step_s, attention_s=attention_s)


def _step_seconds(fitted: Fit, paper: ReplayedSteps, rates: StepRates, batch: int, attention_s: float) -> float:
    """Mean seconds of a step: all outside experts, and each layer's calls as their reads and products overlap."""
    machine = rates.machine
    rate, expert_bytes = machine.token_rate(is_fast=False), fitted.forms[0].expert_bytes
    one_ALE = rates.ratio(paper.rows_ALE) * expert_bytes / rate
    computing_AL = np.where(paper.rows_ALE > 0, one_ALE, 0.0).sum(axis=2)
    used_AL = np.maximum((paper.rows_ALE > 0).sum(axis=2), 1)
    read_s = miss_seconds(expert_bytes, machine.disk_bytes_per_s, machine.layer_s)
    total = 0.0
    for step, layer in np.ndindex(*paper.misses_AL.shape):
        computing = float(computing_AL[step, layer])
        last = computing / int(used_AL[step, layer])
        total += layer_call_seconds(int(paper.misses_AL[step, layer]), read_s, computing, last)
    dense_s = (fitted.dense_bytes - fitted.unread_bytes) / rate * float(rates.ratio(batch)) + attention_s
    dense_s += len(fitted.forms) * (machine.layer_s + rates.call_s[batch])
    outside = max(dense_s, fitted.streamed_bytes / machine.disk_bytes_per_s)
    return outside + total / len(paper.misses_AL)


def measure_step_rates(folder: Path, given: Hardware | None, batches: list[int], width: int = WIDTH) -> StepRates:
    """Rates of this machine, those for several rows at all batches.

    Args:
        folder: on the disk where models are.
        given: rates for one row, or None to measure them, too.
        batches: rows of a step.
        width: of the model, a multiple of 128; what a layer costs besides weights is measured at that width.
    """
    machine, alone_s = given or calibrate(folder), layer_seconds(1, "exact", width)
    if width != WIDTH:
        machine = replace(machine, layer_s=alone_s)
    rates = StepRates(machine, _row_ratios(batches), {})
    for batch in batches:
        together_s = alone_s if batch == 1 else layer_seconds(batch, "exact", width)
        rates.call_s[batch] = max(together_s - alone_s, 0.0)
    return rates


def _row_ratios(batches: list[int]) -> dict[int, float]:
    """How much longer this machine's products of n rows take than of one, at powers of two up to the largest batch."""
    counts = [1 << power for power in range(math.ceil(math.log2(max(*batches, 2))) + 1)]
    weights = square_matrices(WEIGHTS)
    products = {count: Products(count, weights) for count in counts}
    seconds: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(ROUNDS):
        for count in counts:
            began = time.perf_counter()
            products[count]()
            seconds[count].append(time.perf_counter() - began)
    return {count: median(taken) / median(seconds[1]) for count, taken in seconds.items()}
