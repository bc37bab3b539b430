"""What a routing trace says about caching: how far back an expert was used last, and how far ahead it is used next.

Shapes: T tokens, L MoE layers, K experts per token, E experts, C cache slots.
"""

import numpy as np
from numpy.typing import NDArray

from .trace import RoutingTrace

FIRST_USE = -1
NEVER = 1 << 62


def reuse_distance_TK(trace: RoutingTrace, layer: int) -> NDArray[np.int32]:
    """Distinct experts of `layer` that are more recent than each access's own last use.

    All experts of a token are looked up before any of them is inserted, then inserted in slot order, so a
    per-layer LRU cache of C slots hits exactly the accesses with a distance in 0..C-1 (Mattson et al. 1970).

    Returns:
        [T, K] int32; -1 for a first use and for an empty slot.
    """
    distance_TK = np.full((trace.num_tokens, trace.top_k), FIRST_USE, np.int32)
    recency: list[int] = []
    for token_id, experts in enumerate(trace.expert_TLK[:, layer].tolist()):
        for slot, expert in enumerate(experts):
            if expert in recency:
                distance_TK[token_id, slot] = recency.index(expert)
        for expert in experts:
            if expert >= 0:
                if expert in recency:
                    recency.remove(expert)
                recency.insert(0, expert)
    return distance_TK


def reuse_distance_TLK(trace: RoutingTrace) -> NDArray[np.int32]:
    """`reuse_distance_TK` of all layers in one pass: an expert's distance is how many have been used since it was.

    Returns:
        [T, L, K] int32; -1 for a first use and for an empty slot.
    """
    T, L, K = trace.expert_TLK.shape
    E = trace.num_experts
    distance_TLK = np.full((T, L, K), FIRST_USE, np.int32)
    layer_L1 = np.arange(L)[:, None]
    # the last column takes the empty slots, whose id -1 means it
    last_use_LE = np.zeros((L, E + 1), np.int64)
    for token_id, expert_LK in enumerate(trace.expert_TLK):
        before_LK = last_use_LE[layer_L1, expert_LK]
        more_recent_LK = (last_use_LE[:, None, :] > before_LK[:, :, None]).sum(axis=2)
        distance_TLK[token_id] = np.where(before_LK > 0, more_recent_LK, FIRST_USE)
        last_use_LE[layer_L1, expert_LK] = token_id * K + np.arange(1, K + 1)
        last_use_LE[:, E] = 0
    return distance_TLK


def lru_hits_LC(trace: RoutingTrace) -> NDArray[np.int64]:
    """Hits of an LRU of 0, 1, .. E slots in each layer, `[L, E + 1]`, all from one pass over reuse distances."""
    E = trace.num_experts
    hits_LC = np.zeros((trace.num_layers, E + 1), np.int64)
    distance_TLK = reuse_distance_TLK(trace)
    for layer in range(trace.num_layers):
        distance = distance_TLK[:, layer]
        hits_LC[layer, 1:] = np.cumsum(np.bincount(distance[distance >= 0], minlength=E)[:E])
    return hits_LC


def next_use_TK(expert_TK: NDArray[np.integer]) -> NDArray[np.int64]:
    """Row in which each access's expert is used next at this layer; NEVER if it is not."""
    T, K = expert_TK.shape
    flat = expert_TK.reshape(-1)
    order = np.argsort(flat, kind="stable")
    rows = order // K
    upcoming = np.full(flat.size, NEVER, dtype=np.int64)
    same = flat[order][1:] == flat[order][:-1]
    upcoming[order[:-1][same]] = rows[1:][same]
    return upcoming.reshape(T, K)
