"""How alike the routing of neighbouring tokens is: segment routing performance (SRP).

Shapes: T tokens, L MoE layers, E experts.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .affinity import used_TE
from .routing_trace import RoutingTrace


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
        trace: rows in decode order.
        window: m tokens.
        layer: one layer, or all of them together.

    Raises:
        ValueError: if no sequence is as long as a window.

    Source: Liang et al. 2025, "Not All Models Suit Expert Offloading", arXiv:2505.16056, appendix C.
    """
    if window < 1:
        raise ValueError(f"a window has at least 1 token; got {window}")
    layers = range(trace.num_layers) if layer is None else [layer]
    histogram = np.sum([_uses_in_windows(trace, window, each) for each in layers], axis=0)
    counts = np.arange(window + 1)
    activations = int((histogram * counts).sum())
    if not histogram.any():
        raise ValueError(f"no sequence of this trace has {window} tokens; use a shorter window")
    kept = np.cumsum(histogram[::-1])[::-1]
    inside = np.cumsum((histogram * counts)[::-1])[::-1]
    f1 = 2 * inside[1:] / np.maximum(window * kept[1:] + activations, 1)
    best = int(np.argmax(f1))
    return SegmentRouting(float(f1[best]), best + 1, float(window * kept[best + 1] / max(activations, 1)))


def longest_sequence(trace: RoutingTrace) -> int:
    """Tokens of the longest run of rows of one sequence."""
    edges = np.flatnonzero(np.diff(trace.sequence_T)) + 1
    return int(np.diff([0, *edges, trace.num_tokens]).max())


def _uses_in_windows(trace: RoutingTrace, window: int, layer: int) -> NDArray[np.int64]:
    """How many pairs of a window and an expert have 0, 1, .. `window` uses."""
    if trace.num_tokens < window:
        return np.zeros(window + 1, np.int64)
    used = np.asarray(used_TE(trace, layer).todense(), dtype=np.int32)
    total = np.cumsum(np.pad(used, ((1, 0), (0, 0))), axis=0)
    run_T = np.cumsum(np.diff(trace.sequence_T, prepend=trace.sequence_T[:1]) != 0)
    is_inside = run_T[window - 1 :] == run_T[: len(run_T) - window + 1]
    uses = (total[window:] - total[:-window])[is_inside]
    return np.bincount(uses.reshape(-1), minlength=window + 1)
