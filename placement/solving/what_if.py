"""What more hardware would bring to a plan with tiers: the same experts solved again on a larger cluster.

Shapes: G GPUs, M nodes, L layers.
"""

from dataclasses import dataclass, fields, replace

import numpy as np

from ..contract.cluster import Cluster
from ..contract.plan import Plan
from ..contract.problem import Problem
from .cluster_tiers import solve_cluster_tiers

MORE_MEMORY = 64 << 30  # bytes of one purchase: a module of server memory, or two


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """A larger cluster, and the best plan found for it.

    Args:
        change: in words.
        seconds: modelled, of the plan found.
        bound: below every plan of that cluster: no solver can gain more.
    """

    change: str
    seconds: float
    bound: float


def what_more_brings(problem: Problem, plan: Plan, time_limit_s: float = 5.0) -> list[WhatIf]:
    """One more GPU on the first node, and 64 GiB more host memory on each node, each solved by itself.

    Args:
        problem: the data that the plan is judged on; its cluster is the plan's.
        plan: with tiers; its sizes of experts count.
        time_limit_s: of each solve.
    """
    sizes = np.array(plan.metadata["expert_bytes"], np.float64) if "expert_bytes" in plan.metadata else None
    cluster, changes = plan.cluster, {}
    if cluster.rank_cost_GG is None:  # a matrix of costs does not say what a new GPU costs
        changes["one more GPU on node 0"] = with_gpu(cluster, 0)
    if (cluster.dram_bytes_per_s_M > 0).all():
        larger = replace(cluster, dram_bytes_M=cluster.dram_bytes_M + MORE_MEMORY)
        changes["64 GiB more host memory on each node"] = larger
    found = []
    for change, bought in changes.items():
        asked = replace(problem, cluster=bought)
        better = solve_cluster_tiers(asked, expert_bytes=sizes, solver="search", time_limit_s=time_limit_s)
        assert better.certificate is not None
        assert better.certificate.bound is not None
        found.append(WhatIf(change=change, seconds=better.certificate.objective, bound=better.certificate.bound))
    return found


def with_gpu(cluster: Cluster, node: int) -> Cluster:
    """The cluster with one more GPU on a node, like the node's last one."""
    last = int(np.flatnonzero(cluster.node_G == node)[-1])
    arrays = {
        one.name: np.insert(value, last + 1, value[last])
        for one in fields(cluster)
        if one.name.endswith("_G") and isinstance(value := getattr(cluster, one.name), np.ndarray)
    }
    curves = (*cluster.curves[: last + 1], *cluster.curves[last:]) if cluster.curves else ()
    return replace(cluster, curves=curves, **arrays)  # type: ignore[arg-type]
