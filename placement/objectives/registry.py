"""The literal table of objectives: each row names an exact function and what the searches may know of it.

Shapes: L layers.
"""

import numpy as np
from numpy.typing import NDArray

from ..contract.cluster import Cluster
from ..contract.plan import Plan
from ..contract.problem import Problem, Scenario
from .activated import activated_L
from .balance import imbalance_L
from .batches import tail_L
from .churn import moved_bytes_L
from .fanout import gpu_fanout_L, node_fanout_L
from .hops import hops_L
from .latency import layer_seconds_L
from .objective import IMBALANCE, Objective, PartWeights, Term, sum_of
from .prices import HOP_IMBALANCE_PRICE, fanout_weights, imbalance_price

Float = NDArray[np.float64]


def _balance(plan: Plan, scenario: Scenario, problem: Problem) -> Float:
    return imbalance_L(plan, scenario.load_LE)


def _imbalance_price(plan: Plan, scenario: Scenario, problem: Problem) -> Float:
    return imbalance_price(problem.cluster) * imbalance_L(plan, scenario.load_LE)


def _batches(plan: Plan, scenario: Scenario, problem: Problem) -> Float:
    assert scenario.trace is not None
    return tail_L(plan, scenario.trace, plan.cluster.ep.batch_tokens)


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


def _balance_weights(cluster: Cluster) -> PartWeights:
    return IMBALANCE


def _price_weights(cluster: Cluster) -> PartWeights:
    return PartWeights(level=imbalance_price(cluster))


def _gpu_weights(cluster: Cluster) -> PartWeights:
    return PartWeights(fan=1.0)


def _node_weights(cluster: Cluster) -> PartWeights:
    return PartWeights(node=1.0)


def _fanout_weights(cluster: Cluster) -> PartWeights:
    gpu_weight, node_weight = fanout_weights(cluster)
    return PartWeights(fan=gpu_weight, node=node_weight)


def _hops_weights(cluster: Cluster) -> PartWeights:
    return PartWeights(hops=1.0)


def _churn_weights(cluster: Cluster) -> PartWeights:
    return PartWeights(churn=1.0)


BALANCE = Objective("balance", _balance, needs_tokens=False, unit_weights=_balance_weights)
FANOUT = Objective("fanout", _fanout, needs_tokens=True, unit_weights=_fanout_weights)
HOPS = Objective("hops", _hops, needs_tokens=True, unit_weights=_hops_weights)
PRICED = Objective("imbalance-price", _imbalance_price, needs_tokens=False, unit_weights=_price_weights)
CHURN = Objective("churn", _churn, needs_tokens=False, unit_weights=_churn_weights)
# numbers in the rows are weights of parts; docs/placement.md says where each comes from
OBJECTIVES: dict[str, Objective] = {
    "balance": BALANCE,
    "batches": Objective("batches", _batches, needs_tokens=True),
    "activated": Objective("activated", _activated, needs_tokens=False),
    "gpu-fanout": Objective("gpu-fanout", _gpu_fanout, needs_tokens=True, unit_weights=_gpu_weights),
    "node-fanout": Objective("node-fanout", _node_fanout, needs_tokens=True, unit_weights=_node_weights),
    "fanout": FANOUT,
    "hops": HOPS,
    "imbalance-price": PRICED,
    "latency": Objective("latency", _latency, needs_tokens=False),
    "churn": CHURN,
    "fanout+balance": sum_of([Term(weight=1.0, part=FANOUT), Term(weight=1.0, part=PRICED)], "fanout+balance"),
    "hops+balance": sum_of(
        [Term(weight=1.0, part=HOPS), Term(weight=HOP_IMBALANCE_PRICE, part=BALANCE)], "hops+balance"
    ),
}
