"""The best valid lower bound on an objective, for any plan with the same slots on the same machines."""

import numpy as np
from numpy.typing import NDArray

from ..contract.certificate import Bound
from ..contract.plan import Plan
from ..contract.problem import Problem, Scenario
from ..objectives import Objective, Robustness, join_scenarios
from ..objectives.activated import activation_weight_LE
from ..objectives.registry import imbalance_price, split_goal
from .fanout import fanout_bound_L
from .imbalance import imbalance_bound_L

Float = NDArray[np.float64]


def objective_bound(objective: Objective, problem: Problem, plan: Plan, robustness: Robustness) -> Bound | None:
    """Best bound of those that are cheap; None if none is known for this objective.

    The bound of each scenario holds for that scenario alone, so joining them by the same rule holds too.
    """
    parts = objective.parts or ((1.0, objective.name),)
    total_WL = np.zeros((len(problem.scenarios), problem.num_layers))
    names = []
    for weight, name in parts:
        part, goal = split_goal(name) if objective.parts else (name, None)
        for index, scenario in enumerate(problem.scenarios):
            found = _part_bound(part, scenario, problem, plan)
            if found is None:
                return None
            total_WL[index] += weight * (found[0] if goal is None else np.maximum(found[0] - goal, 0))
            names.append(found[1])
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


def _part_bound(name: str, scenario: Scenario, problem: Problem, plan: Plan) -> tuple[Float, str] | None:
    cluster, slots = plan.cluster, plan.num_slots
    if name in ("balance", "imbalance-price"):
        total_L1 = scenario.load_LE.sum(axis=1, keepdims=True)
        weight_LE = np.divide(scenario.load_LE, total_L1, out=np.zeros_like(scenario.load_LE), where=total_L1 > 0)
        price = 1.0 if name == "balance" else imbalance_price(cluster)
        bound_L, label = imbalance_bound_L(weight_LE, slots, cluster.speed_G, equal_shares=plan.dispatch == "uniform")
        return price * bound_L, label
    if name == "activated":
        ones = np.ones(scenario.load_LE.shape, np.int64)
        weight_LE = activation_weight_LE(scenario.load_LE, ones, problem.batch_routes)
        return weight_LE.sum(axis=1) / cluster.num_gpus, "mean"
    if name in ("gpu-fanout", "node-fanout", "fanout") and scenario.trace is not None:
        return fanout_bound_L(name, scenario.trace, plan)
    if name in ("hops", "churn"):
        return np.zeros(problem.num_layers), "zero"
    return None
