"""What the checker of plans on GPUs knows of metrics: balance, fan-outs and hops, computed again from the slots.

Shares no code with the objectives on purpose: tables of which GPUs hold what, filled token by token with NumPy's
indexing, instead of sorted parts and counted pairs. Shapes: T tokens, K experts per token, E experts, G GPUs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import Plan
from ..contract.problem import Scenario
from .figures import NotDerivedError
from .shares import least_peak, shares_by_source, shares_EG

Float = NDArray[np.float64]
CELLS = 1 << 23  # numbers of one table, 64 MiB


def imbalances(plan: Plan, scenario: Scenario) -> list[float]:
    """Fullest over mean GPU of each layer, loads over speeds."""
    table_of = (lambda layer: None) if plan.dispatch == "quota" else partial(shares_EG, plan)
    return [imbalance(plan, layer, load_E, table_of(layer)) for layer, load_E in enumerate(scenario.load_LE)]


def imbalance(plan: Plan, layer: int, load_E: Float, table_EG: Float | None) -> float:
    """The same of one layer for some loads; without a table of shares they are divided in the best way."""
    speed_G = plan.cluster.speed_G
    mean = float(load_E.sum() / speed_G.sum())
    if not mean:
        return 1.0
    if table_EG is None:
        return least_peak(plan, layer, load_E) / mean
    return float((load_E @ table_EG[:-1] / speed_G).max()) / mean


def fanouts(plan: Plan, scenario: Scenario, *, of_nodes: bool) -> list[float]:
    """Mean distinct GPUs, or nodes, of a token's experts in each layer; tokens without experts do not count.

    Under `nearest` the source of sequence i is GPU i mod G.
    """
    trace = _tokens(scenario)
    gpus = plan.cluster.num_gpus
    group_G = plan.cluster.node_G if of_nodes else np.arange(gpus)
    member = np.eye(int(group_G.max()) + 1)[group_G]
    found = []
    for layer in range(plan.num_layers):
        choice_TK = trace.expert_TLK[:, layer].astype(np.int64)
        is_used_T = choice_TK.max(axis=1) >= 0
        choice_TK, source_T = choice_TK[is_used_T], trace.sequence_T[is_used_T] % gpus
        total = 0.0
        for source, table_EG in shares_by_source(plan, layer, sorted(set(source_T.tolist()))):
            mine_TK = choice_TK if source is None else choice_TK[source_T == source]
            reached = table_EG @ member
            step = max(1, CELLS // reached.shape[1])
            total += sum(_touched(reached, mine_TK[at : at + step]) for at in range(0, len(mine_TK), step))
        found.append(total / max(len(choice_TK), 1))
    return found


def _touched(reached: Float, choice_TK: NDArray[np.int64]) -> float:
    """Expected groups that the tokens touch, an expert that a token names twice counted once."""
    avoided = np.ones((len(choice_TK), reached.shape[1]))
    for k in range(choice_TK.shape[1]):
        again = (choice_TK[:, :k] == choice_TK[:, [k]]).any(axis=1)
        here = np.where(again, -1, choice_TK[:, k])
        avoided *= 1 - np.minimum(reached[here], 1)
    return float(avoided.shape[1] * len(avoided) - avoided.sum())


def moves(plan: Plan, scenario: Scenario, cost_GG: Float) -> list[float]:
    """Mean cost of the way of a token's first choice into each layer but the first."""
    trace = _tokens(scenario)
    found = []
    for layer in range(1, plan.num_layers):
        first = [_first(trace, one) for one in (layer - 1, layer)]
        known = (first[0] >= 0) & (first[1] >= 0)
        there, here = shares_EG(plan, layer - 1) @ cost_GG, shares_EG(plan, layer)
        cost_T = (there[first[0][known]] * here[first[1][known]]).sum(axis=1)
        found.append(float(cost_T.mean()) if len(cost_T) else 0.0)
    return found


def hops(plan: Plan, scenario: Scenario) -> float:
    """Share of tokens whose first choice changes its GPU, mean over the transitions between layers."""
    found = moves(plan, scenario, 1 - np.eye(plan.cluster.num_gpus))
    return sum(found) / len(found) if found else 0.0


def _tokens(scenario: Scenario) -> Any:
    if scenario.trace is None:
        raise NotDerivedError(f"{scenario.name} has loads only, and this needs tokens: give the trace")
    return scenario.trace


def _first(trace: Any, layer: int) -> NDArray[np.int64]:
    if trace.weight_TLK is None:
        return np.asarray(trace.expert_TLK[:, layer, 0], np.int64)
    heaviest = np.argmax(trace.weight_TLK[:, layer].astype(np.float32), axis=1)
    return np.asarray(trace.expert_TLK[np.arange(len(heaviest)), layer, heaviest], np.int64)


# the metrics of a certificate, each on one scenario; those after the first need tokens
METRICS: dict[str, Callable[[Plan, Scenario], float]] = {
    "balancedness": lambda plan, scenario: float(np.mean([1 / value for value in imbalances(plan, scenario)])),
    "gpu_fanout": lambda plan, scenario: float(np.mean(fanouts(plan, scenario, of_nodes=False))),
    "node_fanout": lambda plan, scenario: float(np.mean(fanouts(plan, scenario, of_nodes=True))),
    "hops": hops,
}
