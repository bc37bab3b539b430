"""From a map to a plan: its certificate, its independent check, its metrics on other data."""

import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..checking.check import require_valid
from ..contract.certificate import Certificate, Robustness
from ..contract.plan import Plan
from ..contract.problem import Problem
from ..objectives import Objective
from ..scoring.score import METRICS, score

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
KEPT_DIGITS = 12  # of the loads in a plan: nine survive the largest count of an export, and files stay small


def make_plan(problem: Problem, map_LP: Integer, *, solver: str, objective: Objective) -> Plan:
    """The plan of a map, without a certificate.

    Args:
        problem: what was placed; its mean loads and the names of its data go into the plan's metadata.
        map_LP: the expert in each slot, GPU by GPU.
        solver: name that the plan bears, as in SOLVERS.
        objective: the objective that was minimised; the plan bears its name.
    """
    return Plan(
        physical_to_logical_LP=without_padding(problem, map_LP),
        experts_per_layer=problem.experts_per_layer,
        num_experts=problem.num_experts,
        cluster=problem.cluster,
        layer_ids=problem.layer_ids,
        hidden_layers=problem.hidden_layers,
        dispatch=problem.cluster.ep.dispatch,
        solver=solver,
        objective_name=objective.name,
        metadata={
            "load": _rounded(problem.load_WLE.mean(axis=0)),
            "planned_on": [scenario.name for scenario in problem.scenarios],
        },
    )


def without_padding(problem: Problem, map_LP: Integer) -> Integer:
    """The map with further copies of the hottest experts where solvers put ids that a layer does not have."""
    if problem.experts_per_layer is None:
        return map_LP
    result_LP, load_LE = map_LP.copy(), problem.weight_WLE.max(axis=0)
    per_gpu = problem.slots_per_gpu
    for layer, count in enumerate(problem.experts_per_layer):
        row_P, real_E = result_LP[layer], load_LE[layer, :count]
        for slot in np.flatnonzero(row_P >= count).tolist():
            start = slot // per_gpu * per_gpu
            copies_E = np.maximum(np.bincount(row_P[row_P < count], minlength=count), 1)
            wish_E = real_E / copies_E
            wish_E[[e for e in row_P[start : start + per_gpu].tolist() if e < count]] -= 2  # shares are 1 at most
            row_P[slot] = int(wish_E.argmax())
    return result_LP


def _rounded(load_LE: Float) -> list[list[float]]:
    return [[float(f"{load:.{KEPT_DIGITS}g}") for load in row] for row in load_LE.tolist()]


def certify(
    problem: Problem,
    plan: Plan,
    objective: Objective,
    robustness: Robustness,
    began: float,
    proved_L: Float | None = None,
) -> Plan:
    """Attach the certificate and check plan and certificate with independent code.

    Args:
        problem, plan, objective, robustness: what was solved, and how.
        began: `time.perf_counter()` at the start.
        proved_L: lower bounds per layer that the solver proved itself for the worst scenario, or None.

    Raises:
        RuntimeError: if the check finds a fault: the solver is wrong.
    """
    holds = (robustness == "max" or len(problem.scenarios) == 1) and problem.experts_per_layer is None
    found = score(problem, plan, objective, robustness=robustness, proved_L=proved_L if holds else None)
    certificate = Certificate(
        objective_name=objective.name,
        objective=found.objective,
        bound=found.bound,
        bound_name=found.bound_name,
        gap_L=found.gap_L,
        in_sample={key: getattr(found, key) for key in METRICS},
        seconds=time.perf_counter() - began,
        robustness=robustness,
        data_bound=found.data_bound,
    )
    plan = plan.with_certificate(certificate)
    require_valid(plan, problem)
    return plan


def validate_plan(plan: Plan, held: Mapping[str, Problem]) -> Plan:
    """Add the plan's metrics on held-out data, by name of the data, to its certificate."""
    if plan.certificate is None or not held:
        return plan
    found = {}
    for name, data in held.items():
        scored = score(data, plan, "balance")
        found[name] = {key: getattr(scored, key) for key in METRICS}
    return plan.with_certificate(replace(plan.certificate, out_of_sample=found))
