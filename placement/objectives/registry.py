"""The objectives by name, and how scenarios and objectives are joined."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..contract.cluster import Cluster
from ..contract.plan import Plan
from ..contract.problem import Problem, Scenario
from .activated import activated_L
from .balance import imbalance_L
from .churn import moved_bytes_L
from .fanout import gpu_fanout_L, node_fanout_L
from .hops import hops_L
from .latency import layer_seconds_L

Float = NDArray[np.float64]
Robustness = Literal["mean", "max", "cvar"]
CVAR_SHARE = 0.5
PRICE_ONE_NODE, PRICE_SEVERAL_NODES = 1.8, 1.0  # see docs/placement.md, "What it reaches"
HOP_IMBALANCE_PRICE = 0.23
GOAL_PRICE = 100.0


@dataclass(frozen=True)
class Objective:
    """One value per layer for a plan and a scenario, lower is better.

    Args:
        name: as on the command line.
        layers: the exact function.
        needs_tokens: whether a scenario must have its trace.
        parts: for sums, (weight, name) of the parts.
    """

    name: str
    layers: Callable[[Plan, Scenario, Problem], Float]
    needs_tokens: bool
    parts: tuple[tuple[float, str], ...] = ()


def evaluate_L(objective: Objective, plan: Plan, problem: Problem, robustness: Robustness = "max") -> Float:
    """The objective of each layer, scenarios joined by the robustness rule.

    Raises:
        ValueError: if the objective needs tokens and a scenario has only loads.
    """
    if objective.needs_tokens and not problem.has_tokens:
        raise ValueError(f"objective {objective.name} needs a routing trace (--trace); loads only tell balance")
    value_WL = np.stack([objective.layers(plan, scenario, problem) for scenario in problem.scenarios])
    return join_scenarios(value_WL, robustness)


def evaluate(objective: Objective, plan: Plan, problem: Problem, robustness: Robustness = "max") -> float:
    """Mean over layers of `evaluate_L`."""
    return float(evaluate_L(objective, plan, problem, robustness).mean())


def join_scenarios(value_WL: Float, robustness: Robustness) -> Float:
    """Per layer: the mean over scenarios, the worst one, or the mean of the worst half (CVaR)."""
    if robustness == "mean":
        return np.asarray(value_WL.mean(axis=0))
    worst = 1 if robustness == "max" else int(np.ceil(CVAR_SHARE * len(value_WL)))
    return np.asarray(np.sort(value_WL, axis=0)[-worst:].mean(axis=0))


def weighted(parts: Sequence[tuple[float, str]], name: str | None = None) -> Objective:
    """A weighted sum of named objectives: `weighted([(1, "fanout"), (2, "balance")])`.

    A part may carry a goal: "balance<=1.1" counts only what the fullest GPU is above 1.1 times the mean.
    """
    chosen = [(weight, *split_goal(part)) for weight, part in parts]

    def layers(plan: Plan, scenario: Scenario, problem: Problem) -> Float:
        values = [(w, OBJECTIVES[part].layers(plan, scenario, problem), goal) for w, part, goal in chosen]
        return np.asarray(
            sum(w * (value if goal is None else np.maximum(value - goal, 0)) for w, value, goal in values)
        )

    label = name or "+".join(f"{weight:g}*{part}" for weight, part in parts)
    return Objective(label, layers, any(OBJECTIVES[part].needs_tokens for _, part, _ in chosen), tuple(parts))


def split_goal(part: str) -> tuple[str, float | None]:
    """ "balance<=1.1" as ("balance", 1.1); a name without a goal as (name, None)."""
    name, _, goal = part.partition("<=")
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; there are {', '.join(OBJECTIVES)}")
    try:
        return name, float(goal) if goal else None
    except ValueError:
        raise ValueError(f"the goal of {name} must be a number; got {goal!r}") from None


def lexicographic(parts: Sequence[str]) -> Objective:
    """First things first: each part but the last is brought to its goal, whatever that costs the parts after it.

    Args:
        parts: like ["balance<=1.1", "fanout"]; a layer 1 % off its goal pays as much as one more GPU per token.
    """
    for part in parts[:-1]:
        if split_goal(part)[1] is None:
            raise ValueError(f"{part} comes before another objective and needs a goal, for instance {part}<=1.1")
    weights = [GOAL_PRICE ** (len(parts) - 1 - rank) for rank in range(len(parts))]
    return weighted(list(zip(weights, parts, strict=True)), ",".join(parts))


def with_churn(objective: Objective, weight: float) -> Objective:
    """The objective plus `weight` per gigabyte that a layer moves away from `Problem.current`."""
    parts = objective.parts or ((1.0, objective.name),)
    return weighted([*parts, (weight, "churn")], f"{objective.name}+{weight:g}*churn")


def without_churn(objective: Objective) -> Objective:
    """The objective without its churn part."""
    parts = [part for part in objective.parts if part[1] != "churn"]
    return objective if len(parts) == len(objective.parts) else weighted(parts)


def fanout_weights(cluster: Cluster) -> tuple[float, float]:
    """Weights of GPU and node fan-out in `fanout`: GPUs alone on one node, else nodes plus GPUs at NVLink's price."""
    return (1.0, 0.0) if cluster.num_nodes == 1 else (1 / cluster.node_link_ratio, 1.0)


def imbalance_price(cluster: Cluster) -> float:
    """What `fanout+balance` pays for the fullest GPU being twice as full as the mean one."""
    return PRICE_ONE_NODE if cluster.num_nodes == 1 else PRICE_SEVERAL_NODES


@dataclass(frozen=True)
class PartWeights:
    """fan * GPU fan-out + node * node fan-out + level * (imbalance above goal) + hops * share + churn * GB moved."""

    fan: float = 0.0
    node: float = 0.0
    level: float = 0.0
    hops: float = 0.0
    churn: float = 0.0
    goal: float = 0.0


def part_weights(objective: Objective, cluster: Cluster) -> PartWeights:
    """The weights of those quantities in an objective; other parts (latency, activated) are left out."""
    fan = node = level = hops = churned = goal = 0.0
    for weight, part in objective.parts or ((1.0, objective.name),):
        name, own_goal = split_goal(part) if objective.parts else (part, None)
        if own_goal is not None and name != "balance":
            raise ValueError(f"the search keeps goals of balance only; got {part}")
        goal = goal if own_goal is None else own_goal
        gpu_weight, node_weight = fanout_weights(cluster)
        fan += weight * {"gpu-fanout": 1.0, "fanout": gpu_weight}.get(name, 0.0)
        node += weight * {"node-fanout": 1.0, "fanout": node_weight}.get(name, 0.0)
        level += weight * {"balance": 1.0, "imbalance-price": imbalance_price(cluster)}.get(name, 0.0)
        hops += weight if name == "hops" else 0.0
        churned += weight if name == "churn" else 0.0
    return PartWeights(fan, node, level, hops, churned, goal)


def find_objective(name: str) -> Objective:
    """The objective of that name, or of an expression of names.

    Args:
        name: a key of OBJECTIVES; a weighted sum "fanout+2*balance"; goals in order of rank "balance<=1.1,fanout".

    Raises:
        ValueError: with the names there are.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    base, _, last = name.rpartition("+")
    if base and last.endswith("*churn"):
        return with_churn(find_objective(base), _term(last)[0])
    if "," in name:
        return lexicographic(name.split(","))
    return weighted([_term(term) for term in name.split("+")], name)


def _term(term: str) -> tuple[float, str]:
    factor, times, part = term.rpartition("*")
    try:
        weight = float(factor) if times else 1.0
    except ValueError:
        raise ValueError(f"the weight in {term!r} must be a number, as in 2*balance") from None
    split_goal(part)
    return weight, part


def _balance(plan: Plan, scenario: Scenario, problem: Problem) -> Float:
    return imbalance_L(plan, scenario.load_LE)


def _imbalance_price(plan: Plan, scenario: Scenario, problem: Problem) -> Float:
    return imbalance_price(problem.cluster) * imbalance_L(plan, scenario.load_LE)


def _activated(plan: Plan, scenario: Scenario, problem: Problem) -> Float:
    return activated_L(plan, scenario.load_LE, problem.batch_routes)


def _gpu_fanout(plan: Plan, scenario: Scenario, problem: Problem) -> Float:
    assert scenario.trace is not None
    return gpu_fanout_L(plan, scenario.trace)


def _node_fanout(plan: Plan, scenario: Scenario, problem: Problem) -> Float:
    assert scenario.trace is not None
    return node_fanout_L(plan, scenario.trace)


def _fanout(plan: Plan, scenario: Scenario, problem: Problem) -> Float:
    gpu_weight, node_weight = fanout_weights(problem.cluster)
    fanout_L = gpu_weight * _gpu_fanout(plan, scenario, problem)
    return fanout_L + node_weight * _node_fanout(plan, scenario, problem) if node_weight else fanout_L


def _hops(plan: Plan, scenario: Scenario, problem: Problem) -> Float:
    assert scenario.trace is not None
    L = plan.num_layers
    return hops_L(plan, scenario.trace) * (L / max(L - 1, 1))  # so that the mean over layers is that over transitions


def _latency(plan: Plan, scenario: Scenario, problem: Problem) -> Float:
    return layer_seconds_L(plan, scenario.load_LE, scenario.trace)


def _churn(plan: Plan, scenario: Scenario, problem: Problem) -> Float:
    if problem.current is None:
        raise ValueError("objective churn needs the plan that runs now (--current)")
    return moved_bytes_L(problem.current, plan) / 1e9


OBJECTIVES: dict[str, Objective] = {
    "balance": Objective("balance", _balance, needs_tokens=False),
    "activated": Objective("activated", _activated, needs_tokens=False),
    "gpu-fanout": Objective("gpu-fanout", _gpu_fanout, needs_tokens=True),
    "node-fanout": Objective("node-fanout", _node_fanout, needs_tokens=True),
    "fanout": Objective("fanout", _fanout, needs_tokens=True),
    "hops": Objective("hops", _hops, needs_tokens=True),
    "imbalance-price": Objective("imbalance-price", _imbalance_price, needs_tokens=False),
    "latency": Objective("latency", _latency, needs_tokens=False),
    "churn": Objective("churn", _churn, needs_tokens=False),
}
OBJECTIVES["fanout+balance"] = weighted([(1.0, "fanout"), (1.0, "imbalance-price")], "fanout+balance")
OBJECTIVES["hops+balance"] = weighted([(1.0, "hops"), (HOP_IMBALANCE_PRICE, "balance")], "hops+balance")
