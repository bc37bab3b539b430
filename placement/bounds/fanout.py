"""Valid lower bounds on fan-out.

capacity: a token with n experts needs at least n / S parts.
pairs (one copy per expert): parts hold S items each, so every expert has S - 1 companions; the best choice of them
bounds how many pairs of a token's experts can share a part (b-matching, a transport problem; for many experts the S - 1
best of each row). With K experts and q pairs together a token touches at least phi(q) parts, phi the convex hull over
all partitions of K; phi falls, so phi(bound of mean q) bounds the mean.
Shapes: L layers, T tokens, K experts per token, E experts, G GPUs, S slots per part.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace

from ..contract.plan import Plan
from ..data.bundles import unique_sets
from ..objectives.prices import fanout_weights

Float = NDArray[np.float64]
MATCHING_EXPERTS = 64  # beyond it the matching's linear programme, of E^2 variables, is left out: time for tightness


def fanout_bound_L(name: str, trace: RoutingTrace, plan: Plan) -> tuple[Float, str]:
    """Bound of `gpu-fanout`, `node-fanout` or their sum `fanout`, for any plan with as many slots.

    Args:
        name: one of the three.
        trace: [T, L, K] experts of the tokens.
        plan: only its numbers of slots and its machines count.

    Returns:
        The bound of each layer, and whether capacity or pairs gave it.
    """
    gpu_slots = plan.slots_per_gpu
    node_slots = gpu_slots * int(np.bincount(plan.cluster.node_G).max())
    gpu_L, node_L = _capacity_bound_L(trace, gpu_slots), _capacity_bound_L(trace, node_slots)
    label = "capacity"
    if plan.num_slots == plan.num_experts:
        pairs_gpu_L, pairs_node_L = _pair_bounds_L(trace, plan.num_experts, (gpu_slots, node_slots))
        label = "pairs" if np.any(pairs_gpu_L > gpu_L) or np.any(pairs_node_L > node_L) else label
        gpu_L, node_L = np.maximum(gpu_L, pairs_gpu_L), np.maximum(node_L, pairs_node_L)
    gpu_weight, node_weight = fanout_weights(plan.cluster)
    joined_L = gpu_weight * gpu_L + node_weight * node_L
    return {"gpu-fanout": gpu_L, "node-fanout": node_L, "fanout": joined_L}[name], label


def _capacity_bound_L(trace: RoutingTrace, slots: int) -> Float:
    """A token with n distinct experts needs at least n / S parts, rounded up."""
    ordered = np.sort(trace.expert_TLK, axis=2)
    is_new = ordered >= 0
    is_new[:, :, 1:] &= ordered[:, :, 1:] != ordered[:, :, :-1]
    distinct_TL = is_new.sum(axis=2)
    used_L = np.maximum((distinct_TL > 0).sum(axis=0), 1)
    return np.asarray((-(-distinct_TL // slots)).sum(axis=0) / used_L)


def _pair_bounds_L(trace: RoutingTrace, experts: int, sizes: tuple[int, int]) -> tuple[Float, Float]:
    """The pairs bound for parts of the two sizes; 1 for layers whose tokens have different numbers of experts."""
    bounds = np.ones((2, trace.num_layers))
    for layer in range(trace.num_layers):
        bundles = unique_sets(trace.expert_TLK[:, layer])
        size_B = bundles.size_B
        if not len(size_B) or (size_B != size_B[0]).any():
            continue
        pair_EE = bundles.coactivation(experts) / bundles.tokens
        for index, slots in enumerate(sizes):
            pairs = most_pairs_together(pair_EE, slots)
            bounds[index, layer] = least_parts(int(size_B[0]), slots, experts // slots, pairs)
    return bounds[0], bounds[1]


def most_pairs_together(pair_EE: Float, slots: int) -> float:
    """Upper bound on the pairs per token that share a part, any parts of `slots` experts each."""
    from scipy import sparse
    from scipy.optimize import linprog

    E = len(pair_EE)
    if slots >= E:
        return float(pair_EE.sum()) / 2
    rows = float(np.sort(pair_EE, axis=1)[:, E - slots + 1 :].sum()) / 2
    if E > MATCHING_EXPERTS:
        return rows
    i, j = np.nonzero(~np.eye(E, dtype=bool))
    one = np.ones(len(i))
    column = np.arange(len(i))
    degree = sparse.vstack(
        [
            sparse.csr_array((one, (i, column)), shape=(E, len(i))),
            sparse.csr_array((one, (j, column)), shape=(E, len(i))),
        ]
    )
    done = linprog(  # type: ignore[call-overload]
        -pair_EE[i, j], A_eq=degree, b_eq=np.full(2 * E, slots - 1.0), bounds=(0, 1), method="highs"
    )
    return min(rows, -float(done.fun) / 2 + 1e-9) if done.status == 0 else rows


def least_parts(size: int, slots: int, parts: int, pairs: float) -> float:
    """phi: the least mean number of parts of sets of `size` whose mean number of pairs together is at most `pairs`.

    Args:
        size: experts per token, K.
        slots: of one part, S: no more of a token's experts fit there.
        parts: how many there are.
        pairs: mean number of a token's expert pairs that share a part, 0 .. K (K - 1) / 2.
    """
    points = {
        (sum(n * (n - 1) // 2 for n in partition), len(partition))
        for partition in _partitions(size, slots)
        if len(partition) <= parts
    }
    best = min((d for q, d in points if q <= pairs), default=np.inf)
    for q, d in points:
        for q2, d2 in points:
            if q <= pairs < q2:
                best = min(best, d + (d2 - d) * (pairs - q) / (q2 - q))
    return float(best) if np.isfinite(best) else float(min(d for _, d in points))


def _partitions(size: int, largest: int) -> Iterator[tuple[int, ...]]:
    if size == 0:
        yield ()
    for first in range(min(size, largest), 0, -1):
        for rest in _partitions(size - first, first):
            yield (first, *rest)
