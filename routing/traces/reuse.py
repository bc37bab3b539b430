"""What a routing trace says about caching: how many other experts are touched before one is used again.

Shapes: T tokens, L MoE layers, K experts per token, E experts.
"""

import numpy as np
from numpy.typing import NDArray

from .trace import RoutingTrace

FIRST_USE = -1


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
