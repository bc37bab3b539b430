"""A plan with tiers judged on data: modelled seconds with a bound for that data, and a replay of the trace."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checking.check import check_plan
from ..contract.certificate import relative_gap
from ..contract.plan import Plan
from ..contract.problem import Problem
from ..tiers.layout import scenario_seconds, ways_of_plan
from ..tiers.model import tier_model
from ..tiers.relaxation import relax
from ..tiers.replay import replay

BOUND_S = 30.0  # at most, for the bound; 58 x 256 took 12 s


@dataclass(frozen=True, kw_only=True)
class TierScore:
    """What a plan with tiers is worth on given data.

    Args:
        objective: weighted seconds of the steps, largest mean chains.
        bound: below every plan of the same machines on this data.
        steps: seconds of each kind of step.
        replayed: of the decode steps of the first trace: mean and 95th percentile of seconds, with experts at home and
            with host memory as a cache, whose hit rate is told; empty without a trace.
        seconds: wall time of scoring.
    """

    objective: float
    bound: float
    steps: dict[str, float]
    replayed: dict[str, float]
    seconds: float

    @property
    def gap(self) -> float:
        """(objective - bound) / objective, at least 0."""
        return relative_gap(self.objective, self.bound)

    def to_json(self) -> dict[str, Any]:
        missing = dict.fromkeys(("balancedness", "gpu_fanout", "node_fanout"))
        return {"objective": self.objective, "bound": self.bound, "gap": self.gap, **missing, **vars(self)}


def score_tiers(problem: Problem, plan: Plan) -> TierScore:
    """Judge a plan with homes on the data of a problem whose cluster is the plan's.

    Raises:
        ValueError: if the plan does not fit the data, or breaks its own memories.
    """
    began = time.perf_counter()
    if faults := check_plan(plan):
        raise ValueError(f"the plan is not valid: {'; '.join(faults[:3])}")
    if (plan.num_layers, plan.num_experts) != (problem.num_layers, problem.num_experts):
        raise ValueError(
            f"the plan is for {plan.num_layers} layers x {plan.num_experts} experts, "
            f"the data has {problem.num_layers} x {problem.num_experts}"
        )
    sizes = plan.metadata.get("expert_bytes")
    model = tier_model(problem, None if sizes is None else np.array(sizes, np.float64))
    way_LE = ways_of_plan(model, plan)
    objective = model.seconds(way_LE)
    replayed: dict[str, float] = {}
    if problem.scenarios[0].trace is not None:
        for name, cached in (("at home", False), ("cached", True)):
            found = replay(problem, plan, model, cached=cached)
            replayed |= {f"{name}: mean s": found.mean_s, f"{name}: p95 s": found.p95_s}
            replayed |= {f"{name}: hit rate": found.hit_rate, f"{name}: tokens/s": found.tokens_per_s}
    return TierScore(
        objective=objective,
        bound=min(relax(model, BOUND_S).bound, objective),
        steps=scenario_seconds(model, way_LE),
        replayed=replayed,
        seconds=time.perf_counter() - began,
    )
