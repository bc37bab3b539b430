"""What the checker of plans on GPUs knows of objectives: expressions, their parts, their bounds, scenarios joined.

Shares no code with the objectives and bounds on purpose. Shapes: L layers, G GPUs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..contract.cluster import Cluster
from ..contract.plan import Plan
from ..contract.problem import Problem, Scenario
from .batches import least_tails, tails
from .bounds import least_fanouts, least_imbalances
from .figures import NotDerivedError
from .metrics import fanouts, imbalances, moves
from .seconds import activated, latencies, least_activated

Float = NDArray[np.float64]
Values = Callable[[Plan, Scenario, Problem], list[float]]
# prices of imbalance and of missing a goal, as docs/placement.md gives them
PRICE_ONE_NODE, PRICE_SEVERAL_NODES, PRICE_OF_HOPS, PRICE_OF_GOALS = 1.8, 1.0, 0.23, 100.0
SUMS = {"fanout+balance": "fanout+imbalance-price", "hops+balance": f"hops+{PRICE_OF_HOPS}*balance"}


def layers_again(plan: Plan, problem: Problem, name: str, robustness: str) -> Float:
    """An objective in each layer, scenarios joined, [L].

    Args:
        plan: read slot by slot.
        problem: the data; its `current` is what churn is counted against.
        name: of the objective, as certificates bear it.
        robustness: how scenarios are joined: `max`, `mean`, or `cvar` for the worse half.

    Raises:
        NotDerivedError: if a part is not known, or the data do not settle it.
    """
    return _joined([_valued(name, _VALUES, plan, scenario, problem) for scenario in problem.scenarios], robustness)


def bounds_again(plan: Plan, problem: Problem, name: str, robustness: str) -> Float:
    """What the data prove of that objective in each layer; arguments and errors as above."""
    return _joined([_valued(name, _LEAST, plan, scenario, problem) for scenario in problem.scenarios], robustness)


def _joined(values: list[Float], robustness: str) -> Float:
    falling = np.sort(np.array(values), axis=0)[::-1]
    counted = {"max": 1, "cvar": (len(values) + 1) // 2}.get(robustness, len(values))
    return np.asarray(falling[:counted].mean(axis=0))


def _valued(name: str, parts: dict[str, Values], plan: Plan, scenario: Scenario, problem: Problem) -> Float:
    total_L = np.zeros(plan.num_layers)
    for term in read_terms(name):
        if term.part in parts:
            value_L = np.array(parts[term.part](plan, scenario, problem))
        else:
            value_L = _valued(SUMS[term.part], parts, plan, scenario, problem)
        total_L += term.weight * (value_L if term.goal is None else np.maximum(value_L - term.goal, 0))
    return total_L


def linear_weights(name: str, cluster: Cluster) -> tuple[float, float, float] | None:
    """Prices of imbalance, GPUs and nodes per token, if the objective is a sum of these; None if it is not."""
    gpus_only = cluster.num_nodes == 1
    units: dict[str, tuple[float, float, float]] = {
        "balance": (1.0, 0.0, 0.0),
        "imbalance-price": (_price(cluster), 0.0, 0.0),
        "gpu-fanout": (0.0, 1.0, 0.0),
        "node-fanout": (0.0, 0.0, 1.0),
        "fanout": (0.0, 1.0, 0.0) if gpus_only else (0.0, 1 / _link_ratio(cluster), 1.0),
    }
    total = np.zeros(3)
    for term in read_terms(name):
        part = units.get(term.part) or (linear_weights(SUMS[term.part], cluster) if term.part in SUMS else None)
        if part is None or term.goal is not None:
            return None
        total += term.weight * np.array(part)
    level, fan, node = total.tolist()
    return level, fan, node


@dataclass(frozen=True)
class PricedPart:
    """weight * part, counted from the goal on where there is one."""

    weight: float
    part: str
    goal: float | None = None


def read_terms(text: str) -> list[PricedPart]:
    """The terms of an expression: a name, `fanout+2*balance`, `balance<=1.1,fanout`, and `...+3*churn` behind any.

    Raises:
        NotDerivedError: if it names a part that is not known here.
    """
    if text in _VALUES or text in SUMS:
        return [PricedPart(1.0, text)]
    before, _, last = text.rpartition("+")
    if before and last.endswith("*churn"):
        return [*read_terms(before), _term(last)]
    if "," not in text:
        return [_term(one) for one in text.split("+")]
    ranks = text.split(",")
    return [_term(one, PRICE_OF_GOALS ** (len(ranks) - 1 - rank)) for rank, one in enumerate(ranks)]


def _term(text: str, weight: float | None = None) -> PricedPart:
    factor, times, rest = text.rpartition("*") if weight is None else ("", "", text)
    part, has_goal, goal = rest.partition("<=")
    if part not in _VALUES and part not in SUMS:
        raise NotDerivedError(f"the objective {part!r} is not one that the check knows")
    try:
        price = float(factor) if times else (weight or 1.0)
        return PricedPart(price, part, float(goal) if has_goal else None)
    except ValueError:
        raise NotDerivedError(f"the objective's term {text!r} cannot be read") from None


def _over_gpus_and_nodes(spread: Callable[..., list[float]]) -> Values:
    """GPUs on one node; on several, nodes plus GPUs at the price of NVLink."""

    def values(plan: Plan, scenario: Scenario, problem: Problem) -> list[float]:
        gpus = spread(plan, scenario, of_nodes=False)
        if plan.cluster.num_nodes == 1:
            return gpus
        nodes, ratio = spread(plan, scenario, of_nodes=True), _link_ratio(plan.cluster)
        return [node + gpu / ratio for node, gpu in zip(nodes, gpus, strict=True)]

    return values


def _link_ratio(cluster: Cluster) -> float:
    return max(1.0, float(np.median(cluster.nvlink_bytes_per_s_G / cluster.nic_bytes_per_s_G)))


def _price(cluster: Cluster) -> float:
    return PRICE_ONE_NODE if cluster.num_nodes == 1 else PRICE_SEVERAL_NODES


def _hops(plan: Plan, scenario: Scenario, problem: Problem) -> list[float]:
    """Of a layer the moves into it, scaled so that the mean over layers is that over transitions."""
    gpus, cost_GG = plan.cluster.num_gpus, plan.cluster.rank_cost_GG
    if cost_GG is None:
        cost_GG = 1 - np.eye(gpus)
    elif (mean := cost_GG.sum() / max(gpus * (gpus - 1), 1)) > 0:
        cost_GG = cost_GG / mean
    found = moves(plan, scenario, cost_GG)
    return [0.0, *(move * plan.num_layers / len(found) for move in found)]


def _churn(plan: Plan, scenario: Scenario, problem: Problem) -> list[float]:
    """Gigabytes of copies that no GPU of the running plan holds in its place."""
    if problem.current is None:
        raise NotDerivedError("churn is counted against the plan that ran before: give it with --current")
    size = plan.cluster.model.bytes_per_expert
    if size is None:
        raise NotDerivedError("churn needs the bytes of an expert in the cluster file")
    before, after = (_held(one) for one in (problem.current, plan))
    return [len(after[layer] - before[layer]) * size / 1e9 for layer in range(plan.num_layers)]


def _held(plan: Plan) -> list[set[tuple[int, int]]]:
    """(GPU, expert) of every slot, for each layer."""
    rows = plan.physical_to_logical_LP.tolist()
    return [{(slot // plan.slots_per_gpu, expert) for slot, expert in enumerate(row)} for row in rows]


def _nothing(plan: Plan, scenario: Scenario, problem: Problem) -> list[float]:
    return [0.0] * plan.num_layers


def _unknown(plan: Plan, scenario: Scenario, problem: Problem) -> list[float]:
    raise NotDerivedError("no bound of latency is known")


def _of_tokens(least: Values) -> Values:
    """Where layers differ in their experts, slots without a copy void the counting, and nothing is proved."""
    return lambda plan, scenario, problem: (
        _nothing(plan, scenario, problem) if plan.experts_per_layer is not None else least(plan, scenario, problem)
    )


_VALUES: dict[str, Values] = {
    "balance": lambda plan, scenario, problem: imbalances(plan, scenario),
    "imbalance-price": lambda plan, scenario, problem: [
        _price(plan.cluster) * value for value in imbalances(plan, scenario)
    ],
    "batches": lambda plan, scenario, problem: tails(plan, scenario),
    "activated": activated,
    "gpu-fanout": lambda plan, scenario, problem: fanouts(plan, scenario, of_nodes=False),
    "node-fanout": lambda plan, scenario, problem: fanouts(plan, scenario, of_nodes=True),
    "fanout": _over_gpus_and_nodes(fanouts),
    "hops": _hops,
    "latency": latencies,
    "churn": _churn,
}
_LEAST: dict[str, Values] = {
    "balance": lambda plan, scenario, problem: least_imbalances(plan, scenario),
    "imbalance-price": lambda plan, scenario, problem: [
        _price(plan.cluster) * value for value in least_imbalances(plan, scenario)
    ],
    "batches": _of_tokens(lambda plan, scenario, problem: least_tails(plan, scenario)),
    "activated": least_activated,
    "gpu-fanout": _of_tokens(lambda plan, scenario, problem: least_fanouts(plan, scenario, of_nodes=False)),
    "node-fanout": _of_tokens(lambda plan, scenario, problem: least_fanouts(plan, scenario, of_nodes=True)),
    "fanout": _of_tokens(_over_gpus_and_nodes(least_fanouts)),
    "hops": _nothing,
    "latency": _unknown,
    "churn": _nothing,
}
