"""Fan-out: over how many distinct GPUs, and nodes, a token's experts of one layer are spread.

Exact expectations: each expert of a token goes to a replica independently, by the plan's dispatch policy; under
`nearest` the source of sequence i is GPU i mod G. Shapes: T tokens, L layers, K experts per token, E experts, G GPUs.
"""

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace

from ..contract.plan import Plan
from .dispatch import MAX_NEAREST_GPUS, nearest_share_EG, share_EG

Float = NDArray[np.float64]
CHUNK_CELLS = 1 << 22  # 32 MiB per table of tokens x parts
DISTINCT_PARTS = 512  # beyond it alike parts are counted once, which needs a sort first


def gpu_fanout_L(plan: Plan, trace: RoutingTrace) -> Float:
    """Mean distinct GPUs per token (tokens without experts at a layer do not count), for each layer."""
    return _fanout_L(plan, trace, np.arange(plan.cluster.num_gpus))


def node_fanout_L(plan: Plan, trace: RoutingTrace) -> Float:
    """Mean distinct nodes per token, for each layer."""
    return _fanout_L(plan, trace, plan.cluster.node_G)


def gpu_fanout(plan: Plan, trace: RoutingTrace) -> float:
    """Mean over layers of `gpu_fanout_L`."""
    return float(gpu_fanout_L(plan, trace).mean())


def node_fanout(plan: Plan, trace: RoutingTrace) -> float:
    """Mean over layers of `node_fanout_L`."""
    return float(node_fanout_L(plan, trace).mean())


def _fanout_L(plan: Plan, trace: RoutingTrace, part_G: NDArray[np.int64]) -> Float:
    """Mean distinct parts per token, where GPU g belongs to part_G[g]."""
    if trace.num_layers != plan.num_layers or trace.num_experts > plan.num_experts:
        raise ValueError(
            f"the trace has {trace.num_layers} layers of {trace.num_experts} experts, "
            f"the plan {plan.num_layers} of {plan.num_experts}"
        )
    has_single_copies = bool((plan.replicas_LE == 1).all())
    fanout = np.ones(plan.num_layers)
    for layer in range(plan.num_layers):
        expert_TK = trace.expert_TLK[:, layer]
        if has_single_copies:
            fanout[layer] = _single_copy_fanout(plan, layer, expert_TK, part_G)
        else:
            fanout[layer] = _expected_fanout(plan, layer, expert_TK, trace.sequence_T, part_G)
    return fanout


def _single_copy_fanout(plan: Plan, layer: int, expert_TK: NDArray[np.int16], part_G: NDArray[np.int64]) -> float:
    part_E1 = np.full(plan.num_experts + 1, -1, np.int32)  # the last entry answers for empty slots, id -1
    part_E1[plan.physical_to_logical_LP[layer]] = part_G[np.arange(plan.num_slots) // plan.slots_per_gpu]
    part_TK = np.sort(part_E1[expert_TK], axis=1)
    is_new_TK = part_TK >= 0
    is_new_TK[:, 1:] &= part_TK[:, 1:] != part_TK[:, :-1]
    distinct_T = is_new_TK.sum(axis=1)
    return float(distinct_T.sum() / max(int((distinct_T > 0).sum()), 1))


def _expected_fanout(
    plan: Plan, layer: int, expert_TK: NDArray[np.int16], sequence_T: NDArray[np.int32], part_G: NDArray[np.int64]
) -> float:
    copies_EG = plan.copies_LEG[layer]
    G = plan.cluster.num_gpus
    keep_T = (expert_TK >= 0).any(axis=1)
    expert_TK, source_T = expert_TK[keep_T], sequence_T[keep_T] % G
    if plan.dispatch != "nearest":
        load_E = np.bincount(expert_TK[expert_TK >= 0], minlength=plan.num_experts).astype(np.float64)
        share = share_EG(copies_EG, plan.cluster, plan.dispatch, load_E)
        return _distinct(share, expert_TK, part_G) / max(len(expert_TK), 1)
    if G > MAX_NEAREST_GPUS:
        raise ValueError(f"fan-out under nearest dispatch is told up to {MAX_NEAREST_GPUS} GPUs; got {G}: use uniform")
    total = sum(
        _distinct(nearest_share_EG(copies_EG, plan.cluster, source), expert_TK[source_T == source], part_G)
        for source in np.unique(source_T).tolist()
    )
    return total / max(len(expert_TK), 1)


def _distinct(share: Float, expert_TK: NDArray[np.int16], part_G: NDArray[np.int64]) -> float:
    """Sum over tokens of the expected distinct parts: sum_part 1 - prod_k (1 - share of part in expert k)."""
    parts = int(part_G[-1]) + 1
    part_share = np.zeros((share.shape[0] + 1, parts))  # the last row answers for empty slots
    np.add.at(part_share[:-1].T, part_G, share.T)
    times = np.ones(parts)
    if parts > DISTINCT_PARTS:  # GPUs with the same experts at the same shares answer alike
        part_share, counts = np.unique(part_share, axis=1, return_counts=True)
        times, parts = counts.astype(np.float64), len(counts)
    miss = np.clip(1 - part_share, 0, 1)
    total, step = 0.0, max(1, CHUNK_CELLS // parts)
    expert_TK = _without_repeats(expert_TK)
    for start in range(0, len(expert_TK), step):
        chunk_TK = expert_TK[start : start + step]
        product = miss[chunk_TK[:, 0]]
        for k in range(1, chunk_TK.shape[1]):
            product *= miss[chunk_TK[:, k]]
        total += float(((1 - product) @ times).sum())
    return total


def _without_repeats(expert_TK: NDArray[np.int16]) -> NDArray[np.int16]:
    """An expert named twice by a token is sent once."""
    ordered = np.sort(expert_TK, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1
    return ordered
