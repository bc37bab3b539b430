"""What the checker of plans on GPUs knows of seconds: activated experts and the latency of a layer, GPU by GPU.

Shares no code with the latency model on purpose: loops over GPUs and their experts, from the same numbers of the
cluster file. Shapes: E experts, G GPUs.
"""

import math
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from ..contract.cluster import Cluster
from ..contract.plan import Plan
from ..contract.problem import Problem, Scenario
from .figures import NotDerivedError
from .metrics import fanouts
from .shares import holders, shares_EG

Float = NDArray[np.float64]
# of the model of latency, as docs/placement.md gives it
ROWS_OF_A_TILE, LAUNCH_S, VALUES_OF_A_SCALE, BYTES_OF_A_SCALE = 128, 3e-6, 128, 4


def activated(plan: Plan, scenario: Scenario, problem: Problem) -> list[float]:
    """Expected experts that the busiest GPU reads for one decode batch, copy by copy."""
    routes = plan.cluster.ep.tokens_per_gpu * plan.cluster.num_gpus * problem.top_k
    found = []
    for layer, load_E in enumerate(scenario.load_LE):
        owners, read = holders(plan, layer), Counter[int]()
        for expert, gpus in owners.items():
            for gpu in gpus:
                read[gpu] += _touched(load_E, expert, len(gpus), routes)  # type: ignore[assignment]
        found.append(float(max(read.values())))
    return found


def least_activated(plan: Plan, scenario: Scenario, problem: Problem) -> list[float]:
    """The mean over GPUs if every expert has one copy: further ones are read besides."""
    routes = plan.cluster.ep.tokens_per_gpu * plan.cluster.num_gpus * problem.top_k
    return [
        sum(_touched(load_E, expert, 1, routes) for expert in range(len(load_E))) / plan.cluster.num_gpus
        for load_E in scenario.load_LE
    ]


def _touched(load_E: Float, expert: int, copies: int, routes: float) -> float:
    """Probability that a batch sends a row to one copy of an expert, routes drawn independently."""
    total = float(load_E.sum())
    share = float(load_E[expert]) / total / copies if total else 0.0
    return 1 - (1 - share) ** routes if share < 1 else 1.0


def latencies(plan: Plan, scenario: Scenario, problem: Problem) -> list[float]:
    """Modelled seconds of each layer for one batch: dispatch, the slowest GPU's experts, combine."""
    cluster, model = plan.cluster, plan.cluster.model
    if model.hidden is None or model.moe_intermediate is None:
        raise NotDerivedError("latency needs model.hidden and model.moe_intermediate in the cluster file")
    tokens, top_k = cluster.ep.tokens_per_gpu * cluster.num_gpus, problem.top_k
    operations = 6 * model.hidden * model.moe_intermediate
    size = model.bytes_per_expert or operations / 2
    traffic = _traffic(plan, scenario, top_k, tokens) if cluster.num_gpus > 1 else [0.0] * plan.num_layers
    found = []
    for layer, load_E in enumerate(scenario.load_LE):
        table, owners = shares_EG(plan, layer), holders(plan, layer)
        row_E = load_E / max(load_E.sum(), 1e-300) * tokens * top_k
        slowest = 0.0
        for gpu in range(cluster.num_gpus):
            mine = [expert for expert, gpus in owners.items() if gpu in gpus]
            rows = sum(_padded(float(row_E[e] * table[e, gpu]), cluster) for e in mine)
            read = sum(_touched(load_E, e, len(owners[e]), int(tokens * top_k)) for e in mine)
            compute = rows * operations / float(cluster.flops_G[gpu] * cluster.speed_G[gpu])
            slowest = max(slowest, compute, read * size / float(cluster.hbm_bytes_per_s_G[gpu]))
        found.append(LAUNCH_S + slowest + traffic[layer])
    return found


def _padded(rows: float, cluster: Cluster) -> float:
    return math.ceil(round(rows, 6) / ROWS_OF_A_TILE) * ROWS_OF_A_TILE if cluster.ep.mode == "ht" else rows


def _traffic(plan: Plan, scenario: Scenario, top_k: int, tokens: int) -> list[float]:
    """Seconds of dispatch and combine on the link that is busy longest."""
    cluster, model = plan.cluster, plan.cluster.model
    hidden = model.hidden or 0
    sent = model.dispatch_bytes or hidden + hidden / VALUES_OF_A_SCALE * BYTES_OF_A_SCALE
    bytes_of_a_copy = sent + (model.combine_bytes or 2 * hidden)
    to_gpus, to_nodes = _copies(plan, scenario, top_k)
    inside = 1 / cluster.num_nodes  # of all GPUs, in the mean node
    nvlink = min(cluster.nvlink_bytes_per_s_G.tolist())
    nic = min(*cluster.nic_bytes_per_s_G.tolist(), cluster.rack_bytes_per_s)
    waits = 2 * (LAUNCH_S + (cluster.node_latency_s + cluster.rack_latency_s if cluster.num_nodes > 1 else 0))
    found = []
    for layer, load_E in enumerate(scenario.load_LE):
        stays = 1 / cluster.num_gpus if cluster.num_nodes == 1 else 0.0
        on_nvlink = to_gpus[layer] * (1 - stays) / nvlink
        on_nic = to_nodes[layer] * (1 - inside) / nic
        per_gpu = tokens / cluster.num_gpus * bytes_of_a_copy
        found.append(waits + _skew(plan, layer, load_E) * max(on_nvlink, on_nic) * per_gpu)
    return found


def _copies(plan: Plan, scenario: Scenario, top_k: int) -> tuple[list[float], list[float]]:
    """Copies of a token that cross NVLink, and the NIC, in each layer."""
    ep, layers = plan.cluster.ep, plan.num_layers
    if ep.mode == "ll" or ep.dedup == "none":
        return [float(top_k)] * layers, [float(top_k)] * layers
    if scenario.trace is None:
        gpus = [float(min(top_k, plan.cluster.num_gpus))] * layers
        nodes = [float(min(top_k, plan.cluster.num_nodes))] * layers
    else:
        gpus, nodes = (fanouts(plan, scenario, of_nodes=of_nodes) for of_nodes in (False, True))
    return gpus, nodes if ep.dedup == "node" else gpus


def _skew(plan: Plan, layer: int, load_E: Float) -> float:
    """How much longer the slowest receiver takes than the mean one."""
    got_G = load_E @ shares_EG(plan, layer)[:-1]
    cost_GG = plan.cluster.rank_cost_GG
    weight_G = np.ones(len(got_G))
    if cost_GG is not None and len(got_G) > 1 and cost_GG.sum() > 0:
        weight_G = cost_GG.sum(axis=0) / (cost_GG.sum() / len(got_G))
    return float((got_G * weight_G).max() / got_G.mean()) if got_G.sum() else 1.0
