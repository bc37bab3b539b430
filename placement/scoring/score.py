"""Score: what a plan is worth on given data, with a bound that holds for any plan of that shape."""

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bounds.choice import objective_bound, tighten
from ..checking.check import check_plan
from ..contract.certificate import Robustness, relative_gap
from ..contract.plan import Plan
from ..contract.problem import Problem, Scenario
from ..objectives import Objective, evaluate_L, find_objective, without_churn
from ..objectives.balance import imbalance_L
from ..objectives.fanout import gpu_fanout_L, node_fanout_L
from ..objectives.hops import hop_share

Float = NDArray[np.float64]
METRICS = ("balancedness", "gpu_fanout", "node_fanout", "hops")


@dataclass(frozen=True, kw_only=True)
class Score:
    """Metrics of a plan; with several scenarios, each is the worst one's.

    Args:
        objective_name, objective, bound, bound_name, data_bound: as in a certificate; `bound` is None if none is known.
        balancedness: mean over layers of mean / fullest GPU.
        gpu_fanout, node_fanout, hops: None for data without tokens.
        seconds: wall time of scoring.
        scenarios: the same metrics of each scenario.
        gap_L: gap of each layer.
    """

    objective_name: str
    objective: float
    bound: float | None
    bound_name: str
    balancedness: float
    gpu_fanout: float | None
    node_fanout: float | None
    hops: float | None
    seconds: float
    scenarios: dict[str, dict[str, float | None]] = field(default_factory=dict)
    gap_L: list[float] = field(default_factory=list)
    data_bound: float | None = None

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective, at least 0; None without a bound."""
        return None if self.bound is None else relative_gap(self.objective, self.bound)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "gap": self.gap}


def score(
    problem: Problem,
    plan: Plan,
    objective: str | Objective | None = None,
    *,
    robustness: Robustness = "max",
    proved_L: Float | None = None,
) -> Score:
    """Score a plan on the data of a problem.

    Args:
        problem: the data; its machines are not looked at, a plan carries its own.
        plan: its machines, speeds and dispatch policy count.
        objective: name or objective; None takes the plan's own, or balance if the data has no tokens for it.
        robustness: how scenarios are joined.
        proved_L: lower bounds per layer that a solver has proved on the same data, or None.

    Raises:
        ValueError: if the plan does not fit the data, or the objective needs tokens that the data lacks.
    """
    began = time.perf_counter()
    if faults := check_plan(plan, problem):
        raise ValueError(f"the plan does not fit the data: {'; '.join(faults[:3])}")
    chosen = _objective(objective, plan, problem)
    value_L = evaluate_L(chosen, plan, problem, robustness)
    by_data = objective_bound(chosen, problem, plan, robustness)
    bound = tighten(by_data, proved_L)
    scenarios = {scenario.name: metrics(plan, scenario) for scenario in problem.scenarios}
    gap_L: list[float] = []
    if bound is not None and bound.value_L is not None:
        gap_L = [relative_gap(*pair) for pair in zip(value_L.tolist(), bound.value_L.tolist(), strict=True)]
    return Score(
        objective_name=chosen.name,
        objective=float(value_L.mean()),
        bound=None if bound is None else min(bound.value, float(value_L.mean())),
        bound_name="none" if bound is None else bound.name,
        seconds=time.perf_counter() - began,
        scenarios=scenarios,
        gap_L=gap_L,
        data_bound=None if by_data is None else min(by_data.value, float(value_L.mean())),
        **worst(scenarios),  # type: ignore[arg-type]
    )


def metrics(plan: Plan, scenario: Scenario) -> dict[str, float | None]:
    """Balancedness, fan-outs and hops on one scenario; None where tokens are needed and missing."""
    found: dict[str, float | None] = {
        "balancedness": float((1 / imbalance_L(plan, scenario.load_LE)).mean()),
        "gpu_fanout": None,
        "node_fanout": None,
        "hops": None,
    }
    if scenario.trace is not None:
        found["gpu_fanout"] = float(gpu_fanout_L(plan, scenario.trace).mean())
        found["node_fanout"] = float(node_fanout_L(plan, scenario.trace).mean())
        found["hops"] = hop_share(plan, scenario.trace)
    return found


def ordered_report(found: dict[str, Any]) -> dict[str, Any]:
    """The same report with the keys that other programs read first."""
    first = ("objective", "bound", "gap", "balancedness", "gpu_fanout", "node_fanout", "seconds")
    return {key: found[key] for key in first} | {key: value for key, value in found.items() if key not in first}


def worst(scenarios: dict[str, dict[str, float | None]]) -> dict[str, float | None]:
    """Lowest balancedness, highest of the others, over scenarios."""
    joined: dict[str, float | None] = {}
    for name in METRICS:
        values = [value for found in scenarios.values() if (value := found[name]) is not None]
        is_complete = len(values) == len(scenarios)
        joined[name] = (min if name == "balancedness" else max)(values) if is_complete else None
    return joined


def _objective(objective: str | Objective | None, plan: Plan, problem: Problem) -> Objective:
    if isinstance(objective, Objective):
        return objective
    if objective is not None:
        return find_objective(objective)
    own = find_objective(plan.objective_name or "balance")
    own = own if problem.current is not None else without_churn(own)
    return find_objective("balance") if own.needs_tokens and not problem.has_tokens else own
