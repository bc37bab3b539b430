"""How cacheable a routing trace is: reuse between neighbouring tokens, and hit rates of caches of several sizes.

Shapes: T tokens, L MoE layers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from offload import simulate
from routing.traces import (
    EMPTY,
    RoutingTrace,
    belady_hits_LC,
    longest_sequence,
    lru_hits_LC,
    segment_cache_rate_C,
    segment_routing,
    used_TE,
)

SHARES = (0.125, 0.25, 0.5)
"""Slots over experts of a layer; the middle one is where this project compares caches."""
WINDOW, RATIO = 16, 2.0
"""Tokens of an SRP window and of SCH's foresight, and SCH's slots over a token's need, as in arXiv:2505.16056."""


def adjacent_reuse(trace: RoutingTrace) -> float:
    """Share of a token's experts that the token before it in its sequence visited, mean over layers."""
    is_pair_T = np.diff(trace.sequence_T) == 0
    reused = asked = 0
    for layer in range(trace.num_layers):
        used = used_TE(trace, layer).astype(np.int64).tocsr()
        before, now = used[:-1][is_pair_T], used[1:][is_pair_T]
        reused += int(before.multiply(now).sum())
        asked += int(now.sum())
    return reused / max(asked, 1)


def slots_of(trace: RoutingTrace, share: float) -> int:
    """Slots per layer that are this share of its experts; one token's experts fit at least."""
    return max(trace.top_k, round(share * trace.num_experts))


def locality_of(
    trace: RoutingTrace, *, shares: Sequence[float] = SHARES, policies: Sequence[str] = ()
) -> dict[str, Any]:
    """What caches of a trace can do.

    Args:
        trace: rows in decode order.
        shares: cache sizes, as shares of a layer's experts.
        policies: names in `offload.CACHES` to simulate besides LRU and Belady.

    Returns:
        `adjacent_reuse`, `srp` and `sch` (None where no sequence is long enough), and per policy and share
        `<policy>_<percent>`, such as `lru_25`.
    """
    accesses = max(int((trace.expert_TLK != EMPTY).sum()), 1)
    slots = [slots_of(trace, share) for share in shares]
    lru_LC, belady_LC = lru_hits_LC(trace), belady_hits_LC(trace, slots)
    is_long = longest_sequence(trace) >= WINDOW
    found: dict[str, Any] = {
        "adjacent_reuse": adjacent_reuse(trace),
        "srp": segment_routing(trace, WINDOW).f1 if is_long else None,
        "sch": float(segment_cache_rate_C(trace, [RATIO], WINDOW)[0]) if is_long else None,
    }
    for column, (share, num_slots) in enumerate(zip(shares, slots, strict=True)):
        found[_name("lru", share)] = float(lru_LC[:, num_slots].sum()) / accesses
        found[_name("belady", share)] = float(belady_LC[:, column].sum()) / accesses
        for policy, result in simulate(trace, num_slots, policies=policies).items():
            found[_name(policy, share)] = result.hit_rate
    return found


def _name(policy: str, share: float) -> str:
    """`lru_12.5` and `lru_25`."""
    return f"{policy}_{100 * share:g}"
