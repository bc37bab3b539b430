"""The price of imbalance that a balance floor needs on data not planned on, found inside the planning data.

Layers are planned with little effort on one half of the sequences, at several prices, and judged on the other half.
What a plan loses there against its own half is sampling noise of both; with all sequences it shrinks by sqrt(2), and so
does the loss that is expected of the real plan. The price is read off where the expected balancedness is the floor.
Shapes: L layers, P slots.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..contract.problem import Problem
from ..objectives import PartWeights
from ..run.budget import Budget
from .affinity import MIN_SEQUENCES, search_affinity
from .balance import lpt_swap_LP, robust_weights
from .layer import Effort
from .levels import peaks_L

Float = NDArray[np.float64]
NOISE_LEFT = 0.5**0.5  # twice the sequences have this share of the sampling noise
# Of imbalance, rising: more points against a longer search at each. The objective's own price is 1.8 on one node.
PRICES = (0.7, 1.2, 2.0, 3.5)
LAYERS = 24  # that are planned as a sample, evenly spread. Untried elsewhere
EFFORT = Effort(starts=8, keep=1, rounds=100, polish=40, bundles=2000)
TIME_SHARE = 0.25  # of what is left; the real search needs the rest. Untried elsewhere


def choose_price(problem: Problem, weights: PartWeights, budget: Budget) -> PartWeights:
    """The weights with the least price whose plans keep the floor on sequences that they were not made from.

    Args:
        problem: one scenario with tokens.
        weights: of the objective; `level` is replaced by each price.
        budget: holds the floor; a quarter of what is left is used.

    Raises:
        ValueError: if there are several scenarios, no fan-out to weigh against, or too few sequences.
    """
    trace, floor = problem.scenarios[0].trace, budget.balance_floor
    assert floor is not None
    if len(problem.scenarios) > 1 or trace is None or not (weights.fan or weights.node) or not weights.level:
        raise ValueError("a balance floor needs one trace and an objective of fan-out and balance, like fanout+balance")
    if len(np.unique(trace.sequence_T)) < MIN_SEQUENCES:
        raise ValueError(f"a balance floor needs {MIN_SEQUENCES} sequences; got {len(np.unique(trace.sequence_T))}")
    layers = np.unique(np.linspace(0, problem.num_layers - 1, min(LAYERS, problem.num_layers)).round().astype(int))
    planned, aside = _split(problem.restrict(layers))
    start_LP = lpt_swap_LP(planned, robust_weights(planned.weight_WLE), budget.deadline)
    tried: dict[float, float] = {}
    whole = budget.part(TIME_SHARE)
    for index, price in enumerate(PRICES):
        trial = whole.trial(1 / (len(PRICES) - index))
        map_LP = search_affinity(planned, start_LP, trial, replace(weights, level=price), effort=EFFORT)
        inside, outside = _balancedness(planned, map_LP), _balancedness(aside, map_LP)
        tried[price] = inside - NOISE_LEFT * (inside - outside)
        budget.tell("choosing the price of imbalance", (index + 1) / len(PRICES))
        if tried[price] >= floor:
            break
    return replace(weights, level=_crossing(tried, floor))


def _split(problem: Problem) -> tuple[Problem, Problem]:
    """Every other sequence in the order of recording: both halves see the same mixture as it changes."""
    trace = problem.scenarios[0].trace
    assert trace is not None
    is_aside = np.isin(trace.sequence_T, np.unique(trace.sequence_T)[1::2])
    return problem.with_trace(trace.select(~is_aside)), problem.with_trace(trace.select(is_aside))


def _balancedness(problem: Problem, map_LP: NDArray[np.int64]) -> float:
    speed_G = problem.cluster.speed_G
    peak_L = peaks_L(problem.weight_WLE, map_LP, speed_G)
    return float(np.mean(np.divide(1 / speed_G.sum(), peak_L, out=np.ones_like(peak_L), where=peak_L > 0)))


def _crossing(tried: dict[float, float], floor: float) -> float:
    """Where the line through the last two points reaches the floor, within the prices tried."""
    prices = list(tried)
    if len(prices) == 1 or tried[prices[-1]] < floor:
        return prices[-1]
    low, high = prices[-2:]
    share = (floor - tried[low]) / max(tried[high] - tried[low], 1e-12)
    return float(low * (high / low) ** min(max(share, 0.0), 1.0))
