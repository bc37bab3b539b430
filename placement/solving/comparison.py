"""Plans beside each other on the same data; baselines that know no more than the plan did.

Shapes: L layers, E experts.
"""

from dataclasses import dataclass, replace

import numpy as np

from ..contract.plan import Plan
from ..contract.problem import Problem, Scenario
from ..scoring.score import Score, score
from .certify import KEPT_DIGITS
from .solve import solve

NO_DATA = "no data"
THIS_DATA = "this data"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One plan judged on the data.

    Args:
        name: of the plan in the table.
        planned_on: the data that it was made from.
        plan: a plan for the same machines.
        score: its metrics on the judged data.
    """

    name: str
    planned_on: str
    plan: Plan
    score: Score


def compare_with_baselines(plan: Plan, data: Problem, other: Plan | None = None) -> list[Row]:
    """The contiguous layout, EPLB on the plan's own planning data, EPLB that knows the data, another plan, the plan.

    EPLB that was made from the data it is judged on is no rival of a plan that was not. It is a row of its own, and the
    only EPLB where the plan does not say what it was made from.
    """
    first = [("contiguous", NO_DATA, solve(data, solver="contiguous"))]
    planning, own = planning_problem(plan, data), _planned_on(plan)
    knows_data = planning is not None and _same_loads(planning, data)
    if planning is not None:
        first.append(("EPLB", own, solve(planning, solver="eplb-global")))
    if not knows_data:
        first.append(("EPLB, knowing this data", THIS_DATA, solve(data, solver="eplb-global")))
    if other is not None:
        first.append(("other plan", _planned_on(other), other))
    first.append(("this plan", own, plan))
    return [Row(name=n, planned_on=p, plan=one, score=score(data, one, "balance")) for n, p, one in first]


def planning_problem(plan: Plan, data: Problem) -> Problem | None:
    """The data's problem with the mean loads that the plan was made from; None if the plan does not hold them."""
    try:
        load_LE = np.array(plan.metadata.get("load"), np.float64)
        scenario = Scenario(name=_planned_on(plan), load_LE=load_LE)
        return replace(data, scenarios=(scenario,)) if load_LE.shape == data.scenarios[0].load_LE.shape else None
    except (TypeError, ValueError):
        return None


def _planned_on(plan: Plan) -> str:
    names = plan.metadata.get("planned_on")
    known = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    return ", ".join(names) if known and names else "its planning data"


def _same_loads(planning: Problem, data: Problem) -> bool:
    """Whether both have the same mean loads, up to the digits that plans keep."""
    planned_LE, judged_LE = (problem.load_WLE.mean(axis=0) for problem in (planning, data))
    return bool(np.allclose(planned_LE, judged_LE, rtol=10.0 ** (1 - KEPT_DIGITS)))
