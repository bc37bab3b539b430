"""Modelled latency: search for the fan-out and balance whose sum it nearly is, keep what the model itself prefers.

Around a plan the seconds of a layer grow with the fullest GPU (experts and ingress) and with the copies of a token that
cross the link which binds, NVLink or the NIC. Shapes: L layers, G GPUs, M nodes, P slots.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace

from ..contract.plan import Plan
from ..contract.problem import Problem, Scenario
from ..objectives import Objective, PartWeights, evaluate_L
from ..objectives.balance import gpu_load_LG
from ..objectives.fanout import gpu_fanout_L, node_fanout_L
from ..objectives.latency import expert_seconds_LG, ingress_cost_G, model_sizes, seconds_per_byte, traffic_seconds_L
from ..run.budget import Budget
from .affinity import search_affinity
from .layer import Effort

Integer = NDArray[np.int64]


def search_latency(problem: Problem, start: Plan, objective: Objective, budget: Budget) -> Integer:
    """The better map, layer by layer, of `start`, of a search for its linearised latency, and of both renumbered.

    Args:
        problem: what to place; without tokens there is nothing to weigh against balance.
        start: a plan that is level already; only fan-out is to be gained.
        objective: `latency`, which judges the candidates.
        budget: time, seed and processes of the linearised search.
    """
    maps = [start.physical_to_logical_LP]
    ep = problem.cluster.ep
    if problem.has_tokens and ep.mode == "ht" and ep.dedup != "none" and problem.num_gpus > 1:
        weights = linear_weights(problem, start)
        maps.append(search_affinity(problem, maps[0], budget, weights, effort=Effort()))
    if problem.cluster.rank_cost_GG is not None:
        maps += [_fullest_to_cheapest(problem, start, map_LP) for map_LP in maps]
    value_NL = np.stack([evaluate_L(objective, _with_map(start, map_LP), problem) for map_LP in maps])
    best_L = value_NL.argmin(axis=0)
    return np.stack(maps)[best_L, np.arange(problem.num_layers)]


def linear_weights(problem: Problem, plan: Plan) -> PartWeights:
    """Weights of GPU and node fan-out and of imbalance whose sum changes as the latency of the plan does."""
    scenario = problem.scenarios[0]
    sizes = model_sizes(plan.cluster, scenario.trace)
    experts = float(expert_seconds_LG(plan, scenario.load_LE, sizes).mean())
    traffic = float(traffic_seconds_L(plan, scenario.load_LE, scenario.trace, sizes).mean())
    nvlink_L, nic_L = seconds_per_byte(plan, scenario.trace, sizes)
    is_nic = plan.cluster.num_nodes > 1 and float(nic_L.mean()) > float(nvlink_L.mean())
    copies = (node_fanout_L if is_nic else gpu_fanout_L)(plan, _traced(scenario)).mean()
    per_copy = traffic / float(copies) / (experts + traffic)
    return PartWeights(fan=0.0 if is_nic else per_copy, node=per_copy if is_nic else 0.0, level=1.0)


def _fullest_to_cheapest(problem: Problem, plan: Plan, map_LP: Integer) -> Integer:
    """Within nodes of equally fast GPUs, the fullest GPU's slots go where bytes arrive at the least cost."""
    cluster = problem.cluster
    load_LG = gpu_load_LG(_with_map(plan, map_LP), problem.load_WLE.mean(axis=0))
    cost_G = ingress_cost_G(cluster)
    slot_LGS = map_LP.reshape(problem.num_layers, problem.num_gpus, -1).copy()
    for node in range(cluster.num_nodes):
        gpus = np.flatnonzero(cluster.node_G == node)
        if np.ptp(cluster.speed_G[gpus]) == 0:
            cheapest = gpus[np.argsort(cost_G[gpus], kind="stable")]
            fullest_LG = gpus[np.argsort(-load_LG[:, gpus], axis=1, kind="stable")]
            slot_LGS[:, cheapest] = np.take_along_axis(slot_LGS, fullest_LG[:, :, None], axis=1)
    return slot_LGS.reshape(map_LP.shape)


def _traced(scenario: Scenario) -> RoutingTrace:
    assert scenario.trace is not None
    return scenario.trace


def _with_map(plan: Plan, map_LP: Integer) -> Plan:
    return replace(plan, physical_to_logical_LP=map_LP)
