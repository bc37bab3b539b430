"""How the copies of an expert take turns under each dispatch policy, as one process's tokens see it; NumPy only.

Shapes: L layers, E experts, G processes.
"""

import numpy as np
from numpy.typing import NDArray

from placement import Plan, quota_share_EG

Integer = NDArray[np.int64]
QUOTA_TURNS = 64
"""Turns over which quotas are rounded: a copy's share is right to 1/128, below the noise of a call's tokens."""


def held_by(plan: Plan, layer: int, processes: int) -> list[list[int | None]]:
    """Per process its experts of a layer, in the order of its slots; a second copy on one process is left out."""
    per_gpu = plan.physical_to_logical_LP[layer].reshape(plan.cluster.num_gpus, -1)
    held: list[list[int | None]] = [list(dict.fromkeys(row[row >= 0].tolist())) for row in per_gpu]
    return held + [[] for _ in range(processes - len(held))]


def turns_EG(plan: Plan, copies_EG: Integer, load_E: NDArray[np.float64], source: int) -> Integer:
    """Turns of every expert's copies for tokens whose source is process `source`.

    Args:
        plan: its policy and cluster.
        copies_EG: 1 where a process holds an expert; there may be more processes than the plan has GPUs.
        load_E: tokens of each expert; only `quota` looks at them.
        source: where the tokens are.
    """
    if plan.dispatch == "uniform":
        return copies_EG
    if plan.dispatch == "nearest":
        return _nearest_EG(plan, copies_EG, source)
    G = plan.cluster.num_gpus
    share_EG = np.zeros(copies_EG.shape)
    share_EG[:, :G] = quota_share_EG(copies_EG[:, :G].astype(np.int16), load_E, plan.cluster.speed_G)
    return _rounded_EG(np.where(copies_EG > 0, share_EG, 0.0), copies_EG)


def _nearest_EG(plan: Plan, copies_EG: Integer, source: int) -> Integer:
    G = copies_EG.shape[1]
    node_G = np.full(G, -1)
    node_G[: plan.cluster.num_gpus] = plan.cluster.node_G
    own_EG = copies_EG * (np.arange(G) == source)
    node_EG = copies_EG * (node_G == node_G[source])
    near_EG = np.where(node_EG.any(axis=1, keepdims=True), node_EG, copies_EG)
    return np.where(own_EG.any(axis=1, keepdims=True), own_EG, near_EG)


def _rounded_EG(share_EG: NDArray[np.float64], copies_EG: Integer) -> Integer:
    """Shares as whole turns, largest remainders first; an expert whose shares are lost gets all its copies."""
    exact_EG = share_EG * QUOTA_TURNS
    turns = np.floor(exact_EG + 1e-9).astype(np.int64)  # 1e-9: shares of a linear programme are not quite whole
    for expert, missing in enumerate(QUOTA_TURNS - turns.sum(axis=1)):
        order = np.argsort(-(exact_EG[expert] - turns[expert]), kind="stable")
        for gpu in [gpu for gpu in order if share_EG[expert, gpu] > 0][: max(missing, 0)]:
            turns[expert, gpu] += 1
    return np.where(turns.any(axis=1, keepdims=True), turns, copies_EG)
