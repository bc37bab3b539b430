"""What `expertier trace show` says: balance and locality of a routing trace, layer by layer. Without torch.

Shapes: T tokens, L MoE layers, K experts per token, E experts, C cache sizes.
"""

from typing import Any

import numpy as np

from ..traces import (
    RoutingTrace,
    belady_hits_LC,
    entropy_L,
    load_LE,
    longest_sequence,
    lru_hits_LC,
    reuse_distance_TK,
    segment_cache_rate_C,
    segment_cache_rate_LC,
    segment_routing,
    skew_L,
)

# Windows of SRP and cache sizes of SCH as in the tables of Liang et al. 2025, arXiv:2505.16056; 16 tokens of foresight
# are what they find a prefetcher could know.
WINDOWS, RATIOS, KNOWN = (4, 16, 64, 256), (1.0, 2.0, 3.0, 4.0), 16


def balance(trace: RoutingTrace) -> list[dict[str, Any]]:
    """Per layer: how evenly its experts are used, and how many others come between two uses of one."""
    load = load_LE(trace)
    return [
        {
            "layer": layer,
            "skew": float(skew),
            "entropy": float(entropy),
            "dead_experts": int((load[layer] == 0).sum()),
            "median_reuse_distance": _median(reuse_distance_TK(trace, layer)),
        }
        for layer, (skew, entropy) in enumerate(zip(skew_L(load), entropy_L(load), strict=True))
    ]


def locality(trace: RoutingTrace) -> dict[str, Any]:
    """SRP, SCH and hit rates against cache size: of all layers together, and per layer.

    Returns:
        `srp`, `sch` and `hit_rate`, keyed by window, by cache size over one token's need, and by slots per layer;
        `per_layer` holds the same three for each layer, where SCH is that of a cache of the layer's own.
    """
    hit_rate_NLC = _hit_rates(trace)
    sizes = cache_sizes(trace)
    ratios = [ratio for ratio in RATIOS if ratio * trace.top_k <= trace.num_experts]
    return {
        "srp": _segment_routing(trace, None),
        "sch": _sch(ratios, *(segment_cache_rate_C(trace, ratios, known) for known in (KNOWN, None))),
        "hit_rate": _by_size(sizes, {name: rates[-1] for name, rates in hit_rate_NLC.items()}),
        "per_layer": [
            {
                "srp": _segment_routing(trace, layer),
                "sch": _sch(ratios, *sch_LC),
                "hit_rate": _by_size(sizes, {name: rates[layer] for name, rates in hit_rate_NLC.items()}),
            }
            for layer, sch_LC in enumerate(
                zip(*(segment_cache_rate_LC(trace, ratios, known) for known in (KNOWN, None)), strict=True)
            )
        ],
    }


def cache_sizes(trace: RoutingTrace) -> list[int]:
    """Slots per layer that hit rates are shown for: eighths of the experts that hold one token's at least."""
    eighths = {trace.num_experts * eighth // 8 for eighth in range(1, 9)}
    return sorted({min(trace.top_k, trace.num_experts)} | {size for size in eighths if size >= trace.top_k})


def _hit_rates(trace: RoutingTrace) -> dict[str, np.ndarray]:
    """Hit rates `[L + 1, C]` by name; the last row is that of all layers together.

    `most_used`: the experts with the highest load in the whole trace stay from their first use to the end, and others
    are read past the cache. `belady` must admit what a token uses, as a cache that computes from its slots;
    `belady_bypass` need not, and no cache of any kind hits more often.
    """
    sizes = cache_sizes(trace)
    load = load_LE(trace)
    hits = {
        "lru": lru_hits_LC(trace)[:, sizes],
        "most_used": np.cumsum(np.sort(np.maximum(load - 1, 0), axis=1)[:, ::-1], axis=1)[:, np.array(sizes) - 1],
        "belady": belady_hits_LC(trace, sizes),
        "belady_bypass": belady_hits_LC(trace, sizes, may_bypass=True),
    }
    accesses_L = load.sum(axis=1)
    return {
        name: np.vstack([hits_LC, hits_LC.sum(axis=0)]) / np.maximum([*accesses_L, accesses_L.sum()], 1)[:, None]
        for name, hits_LC in hits.items()
    }


def _segment_routing(trace: RoutingTrace, layer: int | None) -> dict[str, dict[str, float]]:
    longest = longest_sequence(trace)
    return {str(window): vars(segment_routing(trace, window, layer)) for window in WINDOWS if window <= longest}


def _sch(ratios: list[float], windowed_C: np.ndarray, all_C: np.ndarray) -> dict[str, dict[str, float]]:
    return {
        f"{ratio:g}": {str(KNOWN): float(windowed), "all": float(everything)}
        for ratio, windowed, everything in zip(ratios, windowed_C, all_C, strict=True)
    }


def _by_size(sizes: list[int], rates: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    return {
        str(size): {name: float(rate_C[column]) for name, rate_C in rates.items()} for column, size in enumerate(sizes)
    }


def _median(distance_TK: np.ndarray) -> float | None:
    reused = distance_TK[distance_TK >= 0]
    return float(np.median(reused)) if reused.size else None
