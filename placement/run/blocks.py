"""Very many GPUs: plan one block of them and repeat it.

Where the cluster is a number of equal blocks, each with room for every expert, the block's plan on every block is a
plan of the whole. Each GPU then has the share of the load that it has in its block, so imbalance is the block's.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..contract.cluster import Cluster
from ..contract.problem import Problem

Integer = NDArray[np.int64]
MAX_GPUS = 2048  # beyond it a layer table of GPU x expert no longer fits small machines
MAX_ITEMS = 3072  # slots of a layer that a search over all pairs of them takes
GOOD_ITEMS = 768  # so many that it is quick; more only where blocks do not do


def one_block(problem: Problem, *, pairs: bool) -> tuple[Problem, int]:
    """The problem of one block and how many blocks there are; the problem itself and 1 if it is small enough.

    Args:
        problem: its blocks are alike if speeds, memory, links and node sizes repeat.
        pairs: whether the search looks at all pairs of slots (fan-out, hops, churn) and not only at loads.

    Raises:
        ValueError: if the problem is too large and does not fall into such blocks, with what to do.
    """
    G, S = problem.num_gpus, problem.slots_per_gpu
    most = min(MAX_GPUS, max(MAX_ITEMS // S, 1)) if pairs else MAX_GPUS
    if most >= G:
        return problem, 1
    sizes = [size for size in range(most, 0, -1) if G % size == 0 and size * S >= problem.num_experts]
    for size in sizes:
        if is_periodic(problem.cluster, size):
            return replace(problem, cluster=first_gpus(problem.cluster, size), current=None), G // size
    if G <= MAX_GPUS and problem.num_slots <= MAX_ITEMS:
        return problem, 1
    raise ValueError(_explanation(problem, most, bool(sizes)))


def is_periodic(cluster: Cluster, size: int) -> bool:
    """Whether blocks of `size` GPUs are alike: whole nodes (or parts of one node), the same machines in each."""
    G = cluster.num_gpus
    node_BG = cluster.node_G.reshape(-1, size)
    starts_nodes = bool(np.all(node_BG[1:, 0] > node_BG[:-1, -1])) or cluster.num_nodes == 1
    arrays = (value for name, value in vars(cluster).items() if name.endswith("_G") and name != "node_G")
    is_alike = all(np.array_equal(value, np.resize(value[:size], G)) for value in arrays)
    relative_BG = node_BG - node_BG[:, :1]
    return starts_nodes and is_alike and bool((relative_BG == relative_BG[0]).all()) and cluster.rank_cost_GG is None


def first_gpus(cluster: Cluster, size: int) -> Cluster:
    """The first GPUs and their nodes as a cluster."""
    nodes = int(cluster.node_G[size - 1]) + 1
    ends = {"_G": size, "_M": nodes}
    cut = {name: value[: ends[name[-2:]]] for name, value in vars(cluster).items() if name.endswith(("_G", "_M"))}
    return replace(cluster, curves=cluster.curves[:size], **cut)


def _explanation(problem: Problem, most: int, has_sizes: bool) -> str:
    G, S, E = problem.num_gpus, problem.slots_per_gpu, problem.num_experts
    least = -(-E // S)
    head = f"{G} GPUs with {S} slots each are too many for one search ({most} GPUs at this number of slots)"
    groups = f"set ep.size to {most} or less: engines run several such groups"
    if least > most:
        return f"{head}, and a block of {least} GPUs or more is needed to hold {E} experts; use --objective balance"
    if has_sizes:
        return f"{head}, and its blocks are not alike (speeds, nodes or rank_cost_matrix differ); {groups}"
    return f"{head}, and no number of GPUs from {least} to {most} divides {G} into equal blocks; {groups}"
