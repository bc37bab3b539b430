"""One node's part of a plan of several nodes: what that node holds, as a plan of one machine.

Shapes: L layers, E experts, M nodes, P slots.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from .cluster import Cluster
from .homes import COMPUTED, Homes
from .plan import EMPTY, Plan

Integer = NDArray[np.int64]


def node_part(plan: Plan, node: int) -> Plan:
    """The plan of one node; experts that other nodes hold count as on its SSD, where the checkpoint lies.

    So `offload.load(plan=)` on that node keeps in memory what the plan put there, and can run the whole model.

    Args:
        plan: of the whole cluster; without `homes` every expert is on GPUs.
        node: 0 .. M-1.

    Raises:
        ValueError: if there is no such node.
    """
    if not 0 <= node < plan.cluster.num_nodes:
        raise ValueError(f"node {node} is outside 0..{plan.cluster.num_nodes - 1}")
    mine_G = np.flatnonzero(plan.cluster.node_G == node)
    per_gpu = plan.slots_per_gpu
    map_LP = plan.physical_to_logical_LP[:, mine_G[0] * per_gpu : (mine_G[-1] + 1) * per_gpu]
    host_LE, ssd_LE = np.zeros((2, plan.num_layers, plan.num_experts), np.int8)
    if plan.homes is not None:
        host_LE, ssd_LE = plan.homes.host_LEM[:, :, node], plan.homes.ssd_LEM[:, :, node].copy()
    on_gpu_LE = (plan.copies_LEG[:, :, mine_G] > 0).any(axis=2)
    real_LE = np.arange(plan.num_experts) < plan.experts_L[:, None]
    foreign_LE = real_LE & ~on_gpu_LE & (host_LE == 0) & (ssd_LE == 0)
    ssd_LE[foreign_LE] = COMPUTED
    tier_LE = np.where(on_gpu_LE, 0, np.where(host_LE > 0, 1, 2))
    return replace(
        plan,
        physical_to_logical_LP=map_LP if map_LP.shape[1] else np.full((plan.num_layers, len(mine_G)), EMPTY),
        cluster=_node_cluster(plan, node, mine_G),
        homes=Homes(host_LEM=host_LE[:, :, None], ssd_LEM=ssd_LE[:, :, None].astype(np.int8)),
        tier_LE=tier_LE.astype(np.int64),
        certificate=None,
        metadata={**plan.metadata, "node": node, "experts_of_other_nodes": int(foreign_LE.sum())},
    )


def _node_cluster(plan: Plan, node: int, mine_G: Integer) -> Cluster:
    cluster = plan.cluster
    cut = {
        name: value[mine_G] if name.endswith("_G") else value[node : node + 1]
        for name, value in vars(cluster).items()
        if name.endswith(("_G", "_M"))
    }
    cut["node_G"] = np.zeros(len(mine_G), np.int64)
    curves = tuple(cluster.curves[g] for g in mine_G.tolist()) if cluster.curves else ()
    # room for what other nodes hold: this node's SSD has the whole checkpoint
    cut["ssd_bytes_M"] = np.full(1, np.inf)
    return replace(
        cluster, curves=curves, rank_cost_GG=None, ep=cluster.ep.model_copy(update={"size": len(mine_G)}), **cut
    )
