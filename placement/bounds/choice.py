"""The best valid lower bound on an objective, for any plan with the same slots on the same machines.

Shapes: W scenarios, L layers, E experts.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..contract.certificate import Bound, Robustness
from ..contract.plan import Plan
from ..contract.problem import Problem, Scenario
from ..data.batches import count_rows_AE, spread, traffic_batches
from ..objectives import OBJECTIVES, Objective, flat_terms, join_scenarios
from ..objectives.activated import activation_weight_LE
from ..objectives.batches import MOST_BATCHES, batch_size, tail_mean_L
from ..objectives.prices import imbalance_price
from .fanout import fanout_bound_L
from .imbalance import imbalance_bound_L

Float = NDArray[np.float64]
PartBound = Callable[[Scenario, Problem, Plan], tuple[Float, str]]


def objective_bound(objective: Objective, problem: Problem, plan: Plan, robustness: Robustness) -> Bound | None:
    """Best bound of those that are cheap; None if none is known for this objective.

    The bound of each scenario holds for that scenario alone, so joining them by the same rule holds too.

    Args:
        objective: its terms are looked up in `BOUNDS`; one without a row leaves the whole sum without a bound.
        problem: loads or tokens that the bound is computed from.
        plan: only its number of slots, machines and dispatch policy count.
        robustness: how scenarios are joined.
    """
    terms = flat_terms(objective)
    if any(BOUNDS.get(term.part.name) is None or OBJECTIVES[term.part.name] is not term.part for term in terms):
        return None
    total_WL = np.zeros((len(problem.scenarios), problem.num_layers))
    names = []
    for term in terms:
        for index, scenario in enumerate(problem.scenarios):
            if plan.experts_per_layer is not None and term.part.needs_tokens:
                names.append("none")  # the bounds of tokens' sets count the slots that hold no copy
                continue
            bound_L, name = BOUNDS[term.part.name](scenario, problem, plan)
            total_WL[index] += term.above_goal(bound_L)
            names.append(name)
    value_L = join_scenarios(total_WL, robustness)
    return Bound(value=float(value_L.mean()), name=" + ".join(dict.fromkeys(names)), value_L=value_L)


def tighten(bound: Bound | None, proved_L: Float | None) -> Bound | None:
    """The better of a cheap bound and of what a solver has proved, layer by layer."""
    if proved_L is None:
        return bound
    if bound is None or bound.value_L is None:
        value_L, name = proved_L, "MIP dual"
    else:
        value_L = np.maximum(bound.value_L, proved_L)
        name = f"{bound.name}, MIP dual" if np.any(proved_L > bound.value_L * (1 + 1e-9)) else bound.name
    return Bound(value=float(value_L.mean()), name=name, value_L=value_L) if np.all(np.isfinite(value_L)) else bound


def _balance(scenario: Scenario, problem: Problem, plan: Plan) -> tuple[Float, str]:
    total_L1 = scenario.load_LE.sum(axis=1, keepdims=True)
    weight_LE = np.divide(scenario.load_LE, total_L1, out=np.zeros_like(scenario.load_LE), where=total_L1 > 0)
    is_uniform = plan.dispatch == "uniform"
    slots = plan.num_slots
    if plan.experts_per_layer is not None:  # slots of ids that a layer does not have are free for copies
        slots += plan.num_experts - min(plan.experts_per_layer)
    return imbalance_bound_L(weight_LE, slots, plan.cluster.speed_G, equal_shares=is_uniform)


def _batches(scenario: Scenario, problem: Problem, plan: Plan) -> tuple[Float, str]:
    """The bound of every batch on its own; the tail of bounds is below the tail of values."""
    trace = scenario.trace
    assert trace is not None
    batch_AT = spread(traffic_batches(trace, batch_size(trace, plan.cluster.ep.batch_tokens)), MOST_BATCHES)
    bound_AL, name = np.ones((len(batch_AT), problem.num_layers)), "fluid"
    for layer in range(problem.num_layers):
        rows_AE = np.zeros((len(batch_AT), problem.num_experts))
        rows_AE[:, : trace.num_experts] = count_rows_AE(trace, batch_AT, layer)
        weight_AE = rows_AE / np.maximum(rows_AE.sum(axis=1, keepdims=True), 1)
        is_uniform = plan.dispatch == "uniform"
        bound_AL[:, layer], name = imbalance_bound_L(
            weight_AE, plan.num_slots, plan.cluster.speed_G, equal_shares=is_uniform
        )
    return tail_mean_L(bound_AL), f"{name}, batch by batch"


def _imbalance_price(scenario: Scenario, problem: Problem, plan: Plan) -> tuple[Float, str]:
    bound_L, name = _balance(scenario, problem, plan)
    return imbalance_price(plan.cluster) * bound_L, name


def _activated(scenario: Scenario, problem: Problem, plan: Plan) -> tuple[Float, str]:
    """The mean over GPUs with one copy each; further copies only add to it."""
    ones = np.ones(scenario.load_LE.shape, np.int64)
    weight_LE = activation_weight_LE(scenario.load_LE, ones, problem.batch_routes)
    return weight_LE.sum(axis=1) / plan.cluster.num_gpus, "mean"


def _gpu_fanout(scenario: Scenario, problem: Problem, plan: Plan) -> tuple[Float, str]:
    assert scenario.trace is not None
    return fanout_bound_L("gpu-fanout", scenario.trace, plan)


def _node_fanout(scenario: Scenario, problem: Problem, plan: Plan) -> tuple[Float, str]:
    assert scenario.trace is not None
    return fanout_bound_L("node-fanout", scenario.trace, plan)


def _fanout(scenario: Scenario, problem: Problem, plan: Plan) -> tuple[Float, str]:
    assert scenario.trace is not None
    return fanout_bound_L("fanout", scenario.trace, plan)


def _zero(scenario: Scenario, problem: Problem, plan: Plan) -> tuple[Float, str]:
    return np.zeros(problem.num_layers), "zero"


BOUNDS: dict[str, PartBound] = {
    "balance": _balance,
    "batches": _batches,
    "imbalance-price": _imbalance_price,
    "activated": _activated,
    "gpu-fanout": _gpu_fanout,
    "node-fanout": _node_fanout,
    "fanout": _fanout,
    "hops": _zero,
    "churn": _zero,
}
