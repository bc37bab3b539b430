"""Which replica a token goes to: the share of an expert's tokens that each GPU receives.

uniform  every copy gets the same share: what EPLB assumes.
nearest  a copy on the token's own GPU, else one on its node, else any, evenly within the narrowed set: SGLang's rule.
quota    shares chosen by a linear programme that minimises the fullest GPU: LPLB, UltraEP.

Shapes: E experts, G GPUs, M nodes.
"""

import numpy as np
from numpy.typing import NDArray

from ..contract.cluster import Cluster, Dispatch

Float = NDArray[np.float64]
MAX_NEAREST_GPUS = 2048  # shares differ for every source GPU: a table of G x E x G


def share_EG(copies_EG: NDArray[np.int16], cluster: Cluster, policy: Dispatch, load_E: Float) -> Float:
    """Expected share of each expert's tokens per GPU, tokens spread evenly over source GPUs; rows sum to 1.

    Args:
        copies_EG: copies of each expert on each GPU.
        cluster: its nodes and speeds; `uniform` looks at neither.
        policy: one of the three rules above.
        load_E: tokens of each expert; only `quota` looks at them.
    """
    if policy == "uniform":
        return uniform_share_EG(copies_EG)
    if policy == "nearest":
        return _mean_nearest_EG(copies_EG, cluster)
    return quota_share_EG(copies_EG, load_E, cluster.speed_G)


def uniform_share_EG(copies_EG: NDArray[np.int16]) -> Float:
    """Every copy of an expert gets the same share; rows of experts without a copy are 0."""
    count_E1 = copies_EG.sum(axis=1, keepdims=True, dtype=np.float64)
    return np.divide(copies_EG, count_E1, out=np.zeros(copies_EG.shape), where=count_E1 > 0)


def nearest_share_EG(copies_EG: NDArray[np.int16], cluster: Cluster, source: int) -> Float:
    """Shares for tokens whose source is GPU `source`."""
    own = copies_EG * (np.arange(cluster.num_gpus) == source)
    node = copies_EG * (cluster.node_G == cluster.node_G[source])
    near = np.where(own.any(axis=1, keepdims=True), own, np.where(node.any(axis=1, keepdims=True), node, copies_EG))
    return uniform_share_EG(near)


def _mean_nearest_EG(copies_EG: NDArray[np.int16], cluster: Cluster) -> Float:
    """Mean of `nearest_share_EG` over all sources, in closed form."""
    G, M = cluster.num_gpus, cluster.num_nodes
    member_GM = np.zeros((G, M))
    member_GM[np.arange(G), cluster.node_G] = 1
    has_EG = (copies_EG > 0).astype(np.float64)
    copies_EM, has_EM = copies_EG @ member_GM, has_EG @ member_GM
    size_M = member_GM.sum(axis=0)
    needy_EM = np.where(copies_EM > 0, size_M - has_EM, 0.0)
    per_copy_EM = np.divide(needy_EM, copies_EM, out=np.zeros_like(needy_EM), where=copies_EM > 0)
    far_E1 = np.where(copies_EM > 0, 0.0, size_M).sum(axis=1, keepdims=True)
    return (has_EG + copies_EG * per_copy_EM[:, cluster.node_G] + uniform_share_EG(copies_EG) * far_E1) / G


def quota_share_EG(copies_EG: NDArray[np.int16], load_E: Float, speed_G: Float) -> Float:
    """Shares that minimise the fullest GPU (its load over its speed): a fluid linear programme.

    Source: DeepSeek LPLB; SGLang `--ep-dispatch-algorithm lp`.
    """
    from scipy import sparse
    from scipy.optimize import linprog

    expert_N, gpu_N = np.nonzero(copies_EG)
    N, E, G = len(expert_N), *copies_EG.shape
    total = float(load_E.sum())
    if total == 0:
        return uniform_share_EG(copies_EG)
    load_share_E = load_E / total
    route = np.arange(N)
    sums = sparse.csr_array((np.ones(N), (expert_N, route)), shape=(E, N + 1))
    per_gpu = sparse.csr_array((np.ones(N), (gpu_N, route)), shape=(G, N + 1))
    limit = sparse.csr_array((speed_G, (np.arange(G), np.full(G, N))), shape=(G, N + 1))
    cost_N = np.zeros(N + 1)
    cost_N[N] = 1
    done = linprog(  # type: ignore[call-overload]
        cost_N, A_ub=(per_gpu - limit).tocsr(), b_ub=np.zeros(G), A_eq=sums, b_eq=load_share_E, method="highs"
    )
    if done.status != 0:
        raise RuntimeError(f"the quota programme ended with status {done.status}: {done.message}")
    quota_EG = np.zeros(copies_EG.shape)
    quota_EG[expert_N, gpu_N] = np.maximum(done.x[:N], 0)
    sum_E1 = quota_EG.sum(axis=1, keepdims=True)
    return np.where(
        sum_E1 > 0,
        np.divide(quota_EG, sum_E1, where=sum_E1 > 0, out=np.zeros_like(quota_EG)),
        uniform_share_EG(copies_EG),
    )
