"""Objective: one value per layer for a plan and a workload, lower is better; sums of objectives; scenarios joined.

Shapes: W scenarios, L layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

from ..contract.certificate import Robustness
from ..contract.cluster import Cluster
from ..contract.plan import Plan
from ..contract.problem import Problem, Scenario

Float = NDArray[np.float64]
CVAR_SHARE = 0.5  # the worse half of the scenarios; with two of them the worst one. Untried elsewhere


@dataclass(frozen=True)
class PartWeights:
    """An objective as the searches see it: a weighted sum of quantities that they know how to change.

    fan * GPU fan-out + node * node fan-out + level * max(imbalance - goal, 0) + hops * share + churn * GB moved.
    """

    fan: float = 0.0
    node: float = 0.0
    level: float = 0.0
    hops: float = 0.0
    churn: float = 0.0
    goal: float = 0.0


UNKNOWN = PartWeights()
# one unit of imbalance costs one
IMBALANCE = PartWeights(level=1.0)


def no_weights(cluster: Cluster) -> PartWeights:
    """Of objectives that are no sum of those quantities (latency, activated)."""
    return UNKNOWN


@dataclass(frozen=True)
class Objective:
    """One value per layer for a plan and a scenario, lower is better.

    Args:
        name: as on the command line.
        layers: the exact function, [L] values.
        needs_tokens: whether a scenario must have its trace.
        unit_weights: the same objective as exact weights of the searches' quantities, where it is such a sum.
        terms: of a sum, its terms; a sum's weights come from them.
    """

    name: str
    layers: Callable[[Plan, Scenario, Problem], Float]
    needs_tokens: bool
    unit_weights: Callable[[Cluster], PartWeights] = no_weights
    terms: "tuple[Term, ...]" = ()

    def as_terms(self) -> "tuple[Term, ...]":
        """The terms of a sum; the objective itself once, if it is none."""
        return self.terms or (Term(weight=1.0, part=self),)

    def weights(self, cluster: Cluster) -> PartWeights:
        """Weights of the searches' quantities; parts that are no such sum (latency, activated) are left out.

        Raises:
            ValueError: if another part than imbalance has a goal.
        """
        if not self.terms:
            return self.unit_weights(cluster)
        total = dict.fromkeys((field.name for field in fields(PartWeights)), 0.0)
        for term in self.terms:
            unit = term.part.weights(cluster)
            if term.goal is not None and unit != IMBALANCE:
                raise ValueError(f"the search keeps goals of balance only; got {term.label}")
            for name, value in vars(unit).items():
                total[name] += term.weight * value if name != "goal" else 0.0
            total["goal"] = term.goal if term.goal is not None else unit.goal or total["goal"]
        return PartWeights(**total)


@dataclass(frozen=True, kw_only=True)
class Term:
    """weight * part, or weight * max(part - goal, 0) where the part has a goal.

    Args:
        weight: not negative: a bound on the part is then a bound on the term.
        part: the objective that is weighted.
        goal: the value that is good enough, or None.
    """

    weight: float
    part: Objective
    goal: float | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"the weight of {self.part.name} must be a number that is not negative; got {self.weight}")
        if self.goal is not None and not np.isfinite(self.goal):
            raise ValueError(f"the goal of {self.part.name} must be a finite number; got {self.goal}")

    @property
    def label(self) -> str:
        """The part with its goal, as in an expression."""
        return self.part.name if self.goal is None else f"{self.part.name}<={self.goal:g}"

    def above_goal(self, value_L: Float) -> Float:
        """The weighted values of the part, counted from the goal on; valid for bounds of the part, too."""
        return self.weight * (value_L if self.goal is None else np.maximum(value_L - self.goal, 0))


def sum_of(terms: Sequence[Term], name: str | None = None) -> Objective:
    """The weighted sum of the terms as an objective.

    Args:
        terms: at least one; their parts may be sums themselves.
        name: of the sum; None writes the terms out.
    """
    chosen = tuple(terms)

    def layers(plan: Plan, scenario: Scenario, problem: Problem) -> Float:
        return np.asarray(sum(term.above_goal(term.part.layers(plan, scenario, problem)) for term in chosen))

    label = name or "+".join(f"{term.weight:g}*{term.label}" for term in chosen)
    return Objective(label, layers, any(term.part.needs_tokens for term in chosen), terms=chosen)


def without(objective: Objective, part: Objective) -> Objective:
    """The sum without its terms of that part; any other objective as it is."""
    kept = [term for term in objective.terms if term.part is not part]
    return objective if len(kept) == len(objective.terms) else sum_of(kept)


def flat_terms(objective: Objective) -> tuple[Term, ...]:
    """The terms with sums inside sums multiplied out; a sum under a goal stays whole."""
    flat: list[Term] = []
    for term in objective.as_terms():
        if term.goal is None and term.part.terms:
            flat += (replace(one, weight=term.weight * one.weight) for one in flat_terms(term.part))
        else:
            flat.append(term)
    return tuple(flat)


def evaluate_L(objective: Objective, plan: Plan, problem: Problem, robustness: Robustness = "max") -> Float:
    """The objective of each layer, scenarios joined by the robustness rule.

    Raises:
        ValueError: if the objective needs tokens and a scenario has only loads.
    """
    if objective.needs_tokens and not problem.has_tokens:
        raise ValueError(f"objective {objective.name} needs a routing trace (--trace); loads only tell balance")
    if plan.homes is not None:
        raise ValueError(
            f"objective {objective.name} is of plans that keep every expert on GPUs; this one uses host memory or SSDs "
            "and is judged by seconds: `expertier place score PLAN --trace FILE` without --objective"
        )
    value_WL = np.stack([objective.layers(plan, scenario, problem) for scenario in problem.scenarios])
    return join_scenarios(value_WL, robustness)


def evaluate(objective: Objective, plan: Plan, problem: Problem, robustness: Robustness = "max") -> float:
    """Mean over layers of `evaluate_L`."""
    return float(evaluate_L(objective, plan, problem, robustness).mean())


def join_scenarios(value_WL: Float, robustness: Robustness) -> Float:
    """Per layer: the mean over scenarios, the worst one, or the mean of the worse half (CVaR)."""
    if robustness == "mean":
        return np.asarray(value_WL.mean(axis=0))
    worst = 1 if robustness == "max" else int(np.ceil(CVAR_SHARE * len(value_WL)))
    return np.asarray(np.sort(value_WL, axis=0)[-worst:].mean(axis=0))
