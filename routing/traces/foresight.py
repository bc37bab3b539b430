"""Hit rates of caches that know the future: segment cache hit rate (SCH), and Belady's bound at every size.

Without a policy of our own in it: what a trace allows, beside which the caches of `offload` are judged.
Shapes: T tokens, L MoE layers, K experts per token, E experts, C cache sizes. One cache for all layers is that of one
wide layer, which has all their experts and all their slots.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .reuse import next_use_TK
from .routing_trace import EMPTY, RoutingTrace

Integer = NDArray[np.int64]
Float = NDArray[np.float64]
# above every worth, so that what a token uses stays until the next token comes
DEMANDED = 1 << 62


def belady_hits_LC(trace: RoutingTrace, capacities: Sequence[int], *, may_bypass: bool = False) -> Integer:
    """Hits of a cache per layer that evicts the expert whose next use is farthest ahead.

    All experts of a token are looked up before any of them is inserted. Then they are resident together, as in a cache
    that computes from its slots: no policy that must admit hits more often.

    Args:
        trace: rows in decode order.
        capacities: slots per layer, each at least K.
        may_bypass: an expert may also be read past the cache; then no policy at all hits more often.

    Returns:
        `[L, C]`, one column per capacity.

    Raises:
        ValueError: if one token's experts do not fit.

    Source: Belady 1966, "A study of replacement algorithms for a virtual-storage computer".
    """
    if min(capacities) < trace.top_k:
        raise ValueError(f"{min(capacities)} slots do not hold the {trace.top_k} experts of one token")
    key_TLK = _distinct(trace)
    return _hits_CL(
        key_TLK, trace.num_experts, capacities, _NextUse(key_TLK, trace.num_experts), keeps=not may_bypass
    ).T


def segment_cache_rate_C(trace: RoutingTrace, ratios: Sequence[float], window: int | None) -> Float:
    """SCH: hit rates of one cache for all layers that knows the next `window` tokens (None: all of them).

    The cache holds `ratio` times the experts that a token uses in all layers. Each token's experts are looked up before
    anything changes, then inserted; those with the fewest uses in the next `window` tokens leave (ties: the longest
    unused). With all of the future known, the one used farthest ahead leaves.

    Returns:
        One rate per ratio.

    Raises:
        ValueError: if a ratio leaves no room for one expert.

    Source: Liang et al. 2025, "Not All Models Suit Expert Offloading", arXiv:2505.16056, appendix C.
    """
    T, L, K = trace.expert_TLK.shape
    E = trace.num_experts
    key_TLK = _distinct(trace)
    wide_TLK = np.where(key_TLK == E, L * E, key_TLK + E * np.arange(L)[:, None]).reshape(T, 1, L * K)
    return _segment_rate_LC(wide_TLK, L * E, ratios, window)[0]


def segment_cache_rate_LC(trace: RoutingTrace, ratios: Sequence[float], window: int | None) -> Float:
    """SCH of each layer by itself: `ratio` times K slots per layer, otherwise as `segment_cache_rate_C`.

    Returns:
        `[L, C]`, one column per ratio.
    """
    return _segment_rate_LC(_distinct(trace), trace.num_experts, ratios, window)


class _Priority(Protocol):
    def __call__(self, token: int) -> Integer:
        """How much each expert is worth after `token`, `[L, E + 1]`; not negative, and less than 2 T."""


class _NextUse:
    """The sooner a key is used next, the more it is worth; nothing if never."""

    def __init__(self, key_TLK: Integer, num_experts: int) -> None:
        T, L, _ = key_TLK.shape
        upcoming_TLK = np.stack([next_use_TK(key_TLK[:, layer]) for layer in range(L)], axis=1)
        self._worth_TLK = T - np.minimum(upcoming_TLK, T)
        self._key_TLK, self._layer_L1 = key_TLK, np.arange(L)[:, None]
        self._worth_LE = np.zeros((L, num_experts + 1), np.int64)

    def __call__(self, token: int) -> Integer:
        self._worth_LE[self._layer_L1, self._key_TLK[token]] = self._worth_TLK[token]
        return self._worth_LE


class _UsesInWindow:
    """Uses of each expert in the next tokens."""

    def __init__(self, key_TLK: Integer, num_experts: int, window: int) -> None:
        self._key_TLK, self._window = key_TLK, window
        self._layer_L1 = np.arange(key_TLK.shape[1])[:, None]
        self._uses_LE = np.zeros((key_TLK.shape[1], num_experts + 1), np.int64)
        for token in range(min(window, len(key_TLK))):
            self._uses_LE[self._layer_L1, key_TLK[token]] += 1

    def __call__(self, token: int) -> Integer:
        self._uses_LE[self._layer_L1, self._key_TLK[token]] -= 1
        if token + self._window < len(self._key_TLK):
            self._uses_LE[self._layer_L1, self._key_TLK[token + self._window]] += 1
        self._uses_LE[:, -1] = 0
        return self._uses_LE


def _segment_rate_LC(key_TLK: Integer, num_experts: int, ratios: Sequence[float], window: int | None) -> Float:
    capacities = [int(ratio * key_TLK.shape[2]) for ratio in ratios]
    if min(capacities) < 1:
        raise ValueError(f"ratio {min(ratios)} leaves no room for a single expert")
    priority = _NextUse(key_TLK, num_experts) if window is None else _UsesInWindow(key_TLK, num_experts, window)
    accesses_L = (key_TLK < num_experts).sum(axis=(0, 2))
    return _hits_CL(key_TLK, num_experts, capacities, priority, keeps=False).T / np.maximum(accesses_L, 1)[:, None]


def _hits_CL(
    key_TLK: Integer, num_experts: int, capacities: Sequence[int], priority: _Priority, *, keeps: bool
) -> Integer:
    """Hits of caches of all capacities at once; `keeps` says that a token's own keys stay until the next one's come."""
    T, L, K = key_TLK.shape
    layer_L1, slot_K = np.arange(L)[:, None], np.arange(1, K + 1)
    # the last column takes the empty slots
    resident_CLE = np.zeros((len(capacities), L, num_experts + 1), bool)
    last_use_LE = np.zeros((L, num_experts + 1), np.int64)
    hits_CL = np.zeros((len(capacities), L), np.int64)
    firsts = [max(num_experts + 1 - capacity, 0) for capacity in capacities]
    for token, key_LK in enumerate(key_TLK):
        hits_CL += resident_CLE[:, layer_L1, key_LK].sum(axis=2)
        resident_CLE[:, layer_L1, key_LK] = True
        resident_CLE[:, :, num_experts] = False
        last_use_LE[layer_L1, key_LK] = token * K + slot_K
        worth_LE = priority(token) * (T * K + 1) + last_use_LE
        if keeps:
            worth_LE[layer_L1, key_LK] = DEMANDED
        for resident_LE, first in zip(resident_CLE, firsts, strict=True):
            ranked_LE = np.where(resident_LE, worth_LE, -1)
            resident_LE &= ranked_LE >= np.partition(ranked_LE, first, axis=1)[:, first : first + 1]
    return hits_CL


def _distinct(trace: RoutingTrace) -> Integer:
    """Expert ids with E for an empty slot, and for an expert that a token has named before."""
    expert_TLK = trace.expert_TLK.astype(np.int64)
    expert_TLK[expert_TLK == EMPTY] = trace.num_experts
    for slot in range(1, trace.top_k):
        is_repeated_TL = (expert_TLK[:, :, slot : slot + 1] == expert_TLK[:, :, :slot]).any(axis=2)
        expert_TLK[:, :, slot][is_repeated_TL] = trace.num_experts
    return expert_TLK
