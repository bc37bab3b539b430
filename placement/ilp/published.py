"""MoETuner and ExFlow as solvers of our problems: no replicas, equal nodes, traces with tokens.

Shapes: L layers, E experts, G GPUs, P slots.
"""

import numpy as np
from numpy.typing import NDArray

from ..contract.problem import Problem
from ..run.budget import Budget
from ..search.balance import lpt_swap_LP
from ..search.hops.search import pair_shares
from .exflow import solve_exflow
from .moetuner import assign_clusters, cluster_layer

Float = NDArray[np.float64]
Integer = NDArray[np.int64]


def moetuner_LP(problem: Problem, budget: Budget) -> Integer:
    """Cluster each layer by load, then give clusters to GPUs by the traffic between layers."""
    _require_plain(problem, "MoETuner")
    L, E, G = problem.num_layers, problem.num_experts, problem.num_gpus
    weight_LE = problem.weight_WLE.mean(axis=0)
    start_LP = lpt_swap_LP(problem, problem.weight_WLE)
    budget.offer(start_LP)
    cluster_LE = np.empty((L, E), np.int64)
    for layer in range(L):
        budget.tell("MoETuner: clusters", layer / L)
        start_E = np.empty(E, np.int64)
        start_E[start_LP[layer]] = np.arange(E) // problem.slots_per_gpu
        share_s = budget.left_s / 2 / (L - layer)
        cluster_LE[layer] = cluster_layer(weight_LE[layer], G, time_limit_s=share_s, start_E=start_E)
    traffic = np.zeros((L - 1, G, G))
    for layer in range(L - 1):
        pair = pair_shares(problem, layer)
        np.add.at(traffic[layer], (cluster_LE[layer][:, None], cluster_LE[layer + 1]), pair)
    budget.tell("MoETuner: GPUs", 0.5)
    gpu_LC = assign_clusters(traffic, _link_cost(problem), time_limit_s=budget.left_s)
    gpu_LE = np.take_along_axis(gpu_LC, cluster_LE, axis=1)
    return np.argsort(gpu_LE, axis=1, kind="stable")


def exflow_LP(problem: Problem, budget: Budget) -> Integer:
    """Nodes first, then the GPUs of each node."""
    _require_plain(problem, "ExFlow")
    L, E, G, M = problem.num_layers, problem.num_experts, problem.num_gpus, problem.cluster.num_nodes
    if problem.cluster.gpus_per_node is None:
        raise ValueError("ExFlow's stages need equal nodes; use --solver search")
    pair_LEE = np.stack([pair_shares(problem, layer) for layer in range(L - 1)]) if L > 1 else np.zeros((0, E, E))
    budget.offer(np.tile(np.arange(E), (L, 1)))
    everyone = [np.arange(E) for _ in range(L)]
    budget.tell("ExFlow: nodes", 0.0)
    node = solve_exflow(pair_LEE, everyone, M, time_limit_s=budget.left_s / 2) if M > 1 else [np.zeros(E, int)] * L
    gpu_LE = np.empty((L, E), np.int64)
    for m in range(M):
        budget.tell("ExFlow: GPUs", (m + 1) / (M + 1))
        members = [np.flatnonzero(part == m) for part in node]
        inside = solve_exflow(pair_LEE, members, G // M, time_limit_s=budget.left_s / (M - m))
        for layer in range(L):
            gpu_LE[layer, members[layer]] = m * (G // M) + inside[layer]
    return np.argsort(gpu_LE, axis=1, kind="stable")


def _require_plain(problem: Problem, name: str) -> None:
    if problem.num_slots != problem.num_experts:
        raise ValueError(f"{name} knows no replicas; use --replicas 0 or --solver search")
    if not problem.has_tokens:
        raise ValueError(f"{name} needs a routing trace (--trace)")


def _link_cost(problem: Problem) -> Float:
    """1 / bandwidth between GPUs."""
    cluster = problem.cluster
    same_node = cluster.node_G[:, None] == cluster.node_G
    cost = np.where(same_node, 1 / cluster.nvlink_bytes_per_s_G.min(), 1 / cluster.nic_bytes_per_s_G.min())
    np.fill_diagonal(cost, 0)
    return np.asarray(cost, np.float64)
