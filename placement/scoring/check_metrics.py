"""What the checker of plans on GPUs knows of metrics: fan-outs, hops and objectives, computed again from the slots.

Shares no code with the objectives on purpose: tables of which GPUs hold what, filled token by token with NumPy's
indexing, instead of sorted parts and counted pairs. Uniform dispatch only. Shapes: T tokens, E experts, G GPUs.
"""

from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import Plan
from ..contract.problem import Problem, Scenario
from .check_bounds import least_fanouts, least_imbalances

Float = NDArray[np.float64]
CELLS = 1 << 23  # numbers of one table, 64 MiB
# nodes and GPUs of `fanout`, and the prices of imbalance, as docs/placement.md gives them
PRICE_ONE_NODE, PRICE_SEVERAL_NODES, PRICE_OF_HOPS = 1.8, 1.0, 0.23


def shares_EG(plan: Plan, layer: int) -> Float:
    """Part of each expert's tokens on each GPU, copy by copy."""
    row = plan.physical_to_logical_LP[layer].tolist()
    copies = Counter(row)
    table = np.zeros((plan.num_experts + 1, plan.cluster.num_gpus))  # the last row stands for empty choices
    for slot, expert in enumerate(row):
        table[expert, slot // plan.slots_per_gpu] += 1 / copies[expert]
    return table


def imbalances(plan: Plan, scenario: Scenario) -> list[float]:
    """Fullest over mean GPU of each layer, loads over speeds."""
    speeds = plan.cluster.speed_G
    found = []
    for layer, load_E in enumerate(scenario.load_LE):
        load_G = load_E @ shares_EG(plan, layer)[:-1]
        mean = load_G.sum() / speeds.sum()
        found.append(float((load_G / speeds).max() / mean) if mean else 1.0)
    return found


def fanouts(plan: Plan, scenario: Scenario, *, of_nodes: bool) -> list[float]:
    """Mean distinct GPUs, or nodes, of a token's experts in each layer; tokens without experts do not count."""
    assert scenario.trace is not None
    group_G = plan.cluster.node_G if of_nodes else np.arange(plan.cluster.num_gpus)
    member = np.eye(int(group_G.max()) + 1)[group_G]
    found = []
    for layer in range(plan.num_layers):
        reached_EG = shares_EG(plan, layer) @ member
        choice_TK = scenario.trace.expert_TLK[:, layer].astype(np.int64)
        choice_TK = choice_TK[choice_TK.max(axis=1) >= 0]
        total, step = 0.0, max(1, CELLS // reached_EG.shape[1])
        for start in range(0, len(choice_TK), step):
            total += _touched(reached_EG, choice_TK[start : start + step])
        found.append(total / max(len(choice_TK), 1))
    return found


def _touched(reached_EG: Float, choice_TK: NDArray[np.int64]) -> float:
    """Expected groups that the tokens touch, an expert that a token names twice counted once."""
    avoided = np.ones((len(choice_TK), reached_EG.shape[1]))
    for k in range(choice_TK.shape[1]):
        again = (choice_TK[:, :k] == choice_TK[:, [k]]).any(axis=1)
        here = np.where(again, -1, choice_TK[:, k])
        avoided *= 1 - np.minimum(reached_EG[here], 1)
    return float(avoided.shape[1] * len(avoided) - avoided.sum())


def hops(plan: Plan, scenario: Scenario) -> float:
    """Share of tokens whose first choice changes its GPU, mean over the transitions between layers."""
    trace = scenario.trace
    assert trace is not None
    moved = []
    for layer in range(1, plan.num_layers):
        first = [_first(trace, one) for one in (layer - 1, layer)]
        known = (first[0] >= 0) & (first[1] >= 0)
        there, here = (shares_EG(plan, one) for one in (layer - 1, layer))
        stay = (there[first[0][known]] * here[first[1][known]]).sum(axis=1)
        moved.append(1 - float(stay.mean()) if len(stay) else 0.0)
    return sum(moved) / len(moved) if moved else 0.0


def _first(trace: Any, layer: int) -> NDArray[np.int64]:
    if trace.weight_TLK is None:
        return np.asarray(trace.expert_TLK[:, layer, 0], np.int64)
    heaviest = np.argmax(trace.weight_TLK[:, layer].astype(np.float32), axis=1)
    return np.asarray(trace.expert_TLK[np.arange(len(heaviest)), layer, heaviest], np.int64)


def metrics_again(plan: Plan, scenario: Scenario) -> dict[str, float]:
    """The metrics of a certificate on one scenario."""
    found = {"balancedness": float(np.mean([1 / value for value in imbalances(plan, scenario)]))}
    if scenario.trace is not None:
        found["gpu_fanout"] = float(np.mean(fanouts(plan, scenario, of_nodes=False)))
        found["node_fanout"] = float(np.mean(fanouts(plan, scenario, of_nodes=True)))
        found["hops"] = hops(plan, scenario)
    return found


def layers_again(plan: Plan, problem: Problem) -> list[float] | None:
    """The objective of a certificate in each layer, of one scenario; None for objectives that are not derived here."""
    return _layers_of(plan, problem, imbalances, fanouts)


def bounds_again(plan: Plan, problem: Problem) -> list[float] | None:
    """What the data prove of that objective in each layer."""
    return _layers_of(plan, problem, least_imbalances, least_fanouts)


def _layers_of(plan: Plan, problem: Problem, uneven: Any, spread: Any) -> list[float] | None:
    """Layers of an objective made of imbalance and fan-out, or of bounds of both."""
    if len(problem.scenarios) > 1 or plan.experts_per_layer is not None:
        return None
    scenario, name, one_node = problem.scenarios[0], plan.objective_name, plan.cluster.num_nodes == 1
    if name == "balance":
        return [float(value) for value in uneven(plan, scenario)]
    if scenario.trace is None or name not in ("gpu-fanout", "node-fanout", "fanout", "fanout+balance"):
        return None
    over_gpus, over_nodes = (np.array(spread(plan, scenario, of_nodes=of_nodes)) for of_nodes in (False, True))
    joined = over_gpus if one_node else over_nodes + over_gpus / _link_ratio(plan)
    if name == "fanout+balance":
        price = PRICE_ONE_NODE if one_node else PRICE_SEVERAL_NODES
        joined = joined + price * np.array(uneven(plan, scenario))
    return [float(value) for value in {"gpu-fanout": over_gpus, "node-fanout": over_nodes}.get(name, joined)]


def _link_ratio(plan: Plan) -> float:
    cluster = plan.cluster
    return max(1.0, float(np.median(cluster.nvlink_bytes_per_s_G / cluster.nic_bytes_per_s_G)))


def objective_again(plan: Plan, problem: Problem) -> float | None:
    """The objective of a certificate, of one scenario; None for objectives that are not derived here."""
    if len(problem.scenarios) > 1 or plan.cluster.rank_cost_GG is not None:
        return None
    if (layers := layers_again(plan, problem)) is not None:
        return float(np.mean(layers))
    scenario = problem.scenarios[0]
    if plan.objective_name == "balance":
        return float(np.mean(imbalances(plan, scenario)))
    if scenario.trace is None or plan.objective_name not in ("hops", "hops+balance"):
        return None
    price = PRICE_OF_HOPS if plan.objective_name == "hops+balance" else 0.0
    return hops(plan, scenario) + price * float(np.mean(imbalances(plan, scenario)))
