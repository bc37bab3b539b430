"""What a routing trace says about caching: how far back an expert was used last, and how far ahead it is used next.

Shapes: T tokens, L MoE layers, K experts per token, E experts, C cache slots.
"""

import numpy as np
from numpy.typing import NDArray

from .routing_trace import RoutingTrace

# no token comes before the first one
FIRST_USE = -1
# [block, E] int64 of last uses per block: 16 MiB at 256 experts; larger blocks gain nothing and need more memory
BLOCK_ROWS = 8192
NEVER = 1 << 62  # later than any row


def reuse_distance_TK(trace: RoutingTrace, layer: int) -> NDArray[np.int32]:
    """Distinct experts of `layer` that are more recent than each access's own last use.

    All experts of a token are looked up before any of them is inserted, then inserted in slot order, so a
    per-layer LRU cache of C slots hits exactly the accesses with a distance in 0..C-1 (Mattson et al. 1970).

    Returns:
        [T, K] int32; -1 for a first use and for an empty slot.
    """
    expert_TK = trace.expert_TLK[:, layer]
    distance_TK = np.empty(expert_TK.shape, np.int32)
    before_1E = np.zeros((1, trace.num_experts + 1), np.int64)
    for start in range(0, len(expert_TK), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        distance_TK[rows], before_1E = _block_distances(expert_TK[rows], start, before_1E)
    return distance_TK


def _block_distances(
    expert_TK: NDArray[np.int16], start: int, before_1E: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Distances of the rows from `start` on, and when each expert was used last after them (0: never).

    The last column takes the empty slots, whose id -1 means it.
    """
    T, K = expert_TK.shape
    row_T = np.arange(T)
    last_TE = np.zeros((T + 1, before_1E.shape[1]), np.int64)
    last_TE[0] = before_1E
    for slot in range(K):
        last_TE[row_T + 1, expert_TK[:, slot]] = (start + row_T) * K + slot + 1
    last_TE[:, -1] = 0
    np.maximum.accumulate(last_TE, axis=0, out=last_TE)
    distance_TK = np.empty((T, K), np.int32)
    for slot in range(K):
        own_T = last_TE[row_T, expert_TK[:, slot]]
        more_recent_T = (last_TE[:-1] > own_T[:, None]).sum(axis=1)
        distance_TK[:, slot] = np.where(own_T > 0, more_recent_T, FIRST_USE)
    return distance_TK, last_TE[-1:]


def lru_hits_LC(trace: RoutingTrace) -> NDArray[np.int64]:
    """Hits of an LRU of 0, 1, .. E slots in each layer, `[L, E + 1]`, all from one pass over reuse distances."""
    E = trace.num_experts
    hits_LC = np.zeros((trace.num_layers, E + 1), np.int64)
    for layer in range(trace.num_layers):
        distance = reuse_distance_TK(trace, layer)
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
