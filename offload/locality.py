"""How local a routing is: segment routing performance (SRP) and segment cache hit rate (SCH). Without torch.

Shapes: T tokens, L MoE layers, K experts per token, E experts.
Source: Liang et al. 2025, "Not All Models Suit Expert Offloading", arXiv:2505.16056, appendix C.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace, used_TE


@dataclass(frozen=True)
class SegmentRouting:
    """Best F1 of keeping one set of experts for a whole window, and how many experts that keeps.

    `cache_ratio` is window length x experts kept over activations: how much larger than one token's need the set is.
    """

    f1: float
    threshold: int
    cache_ratio: float


def segment_routing(trace: RoutingTrace, window: int, layer: int | None = None) -> SegmentRouting:
    """SRP over all sliding windows of `window` tokens inside a sequence.

    F1(a) = 2 * sum of f over f >= a / (sum over experts and windows of window * [f >= a] + f), maximised over a, where
    f counts the window's tokens that use an expert.

    Args:
        layer: one layer, or all of them together.

    Raises:
        ValueError: if no sequence is as long as a window.
    """
    if window < 1:
        raise ValueError(f"a window has at least 1 token; got {window}")
    layers = range(trace.num_layers) if layer is None else [layer]
    histogram = np.zeros(window + 1, np.int64)
    for each in layers:
        used = np.asarray(used_TE(trace, each).todense(), dtype=np.int32)
        for start, stop in _sequences(trace.sequence_T):
            if stop - start >= window:
                total = np.cumsum(np.pad(used[start:stop], ((1, 0), (0, 0))), axis=0)
                histogram += np.bincount((total[window:] - total[:-window]).reshape(-1), minlength=window + 1)
    counts = np.arange(window + 1)
    activations = int((histogram * counts).sum())
    if not activations:
        raise ValueError(f"no sequence of this trace has {window} tokens; use a shorter window")
    kept = np.cumsum(histogram[::-1])[::-1]
    inside = np.cumsum((histogram * counts)[::-1])[::-1]
    f1 = 2 * inside[1:] / (window * kept[1:] + activations)
    best = int(np.argmax(f1))
    return SegmentRouting(float(f1[best]), best + 1, float(window * kept[best + 1] / activations))


def segment_cache_hits(trace: RoutingTrace, ratio: float, window: int | None) -> float:
    """SCH: hit rate of a cache that knows the next `window` tokens (None: all of them).

    The cache holds `ratio` times the experts that a token uses in all layers. Each token's experts are looked up before
    anything changes, then inserted; those with the fewest uses in the next `window` tokens leave (ties: the longest
    unused). With all of the future known, the one used farthest ahead leaves.
    """
    T, L, E = trace.num_tokens, trace.num_layers, trace.num_experts
    capacity = int(ratio * L * trace.top_k)
    if capacity < 1:
        raise ValueError(f"ratio {ratio} leaves no room for a single expert")
    used = np.concatenate([np.asarray(used_TE(trace, layer).todense(), dtype=bool) for layer in range(L)], axis=1)
    priority = _NextUsePriority(used) if window is None else _WindowPriority(used, window)
    resident, last = np.zeros(L * E, bool), np.zeros(L * E)
    hits = lookups = 0
    for token in range(T):
        demanded = used[token]
        hits += int((resident & demanded).sum())
        lookups += int(demanded.sum())
        resident |= demanded
        last[demanded] = token + 1
        keys = np.flatnonzero(resident)
        if len(keys) > capacity:
            worth = priority(token)[keys] + last[keys] / (T + 2)
            resident[keys[np.argpartition(worth, len(keys) - capacity)[: len(keys) - capacity]]] = False
    return hits / max(lookups, 1)


def _sequences(sequence_T: NDArray[np.int32]) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(sequence_T)) + 1
    return list(zip([0, *edges.tolist()], [*edges.tolist(), len(sequence_T)], strict=True))


class _WindowPriority:
    """Uses of each key in the next tokens."""

    def __init__(self, used: NDArray[np.bool_], window: int) -> None:
        self._total = np.cumsum(np.pad(used, ((1, 0), (0, 0))), axis=0, dtype=np.int32)
        self._window = window

    def __call__(self, token: int) -> NDArray[np.int32]:
        last = len(self._total) - 1
        return self._total[min(token + 1 + self._window, last)] - self._total[token + 1]


class _NextUsePriority:
    """Minus the token in which each key is used next."""

    def __init__(self, used: NDArray[np.bool_]) -> None:
        T, keys = used.shape
        self._next = np.full((T + 1, keys), T + 1, np.int32)
        for token in range(T - 1, -1, -1):
            self._next[token] = np.where(used[token], token, self._next[token + 1])

    def __call__(self, token: int) -> NDArray[np.int32]:
        return -self._next[token + 1]
