"""What happened: hits, misses, bytes, seconds, per layer and in total."""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

MOST_CALLS = 1 << 16
"""Calls whose times are kept for percentiles: 1 MB of them, the last hours of a server."""


@dataclass
class LayerCounters:
    """Counts of one layer; a hit is an expert that was in memory when its layer asked for it (per expert and call)."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0


@dataclass
class AheadCounters:
    """What became of experts that were read before they were asked for, in one layer.

    `issued` reads began. Of these, `useful` ended before the layer asked for the expert, `late` ones were still under
    way then, and `wasted` ones left their slot unused. What is none of the three waits in a slot.
    """

    issued: int = 0
    useful: int = 0
    late: int = 0
    wasted: int = 0
    bytes_read: int = 0


def total_ahead(layers: Iterable[AheadCounters]) -> AheadCounters:
    """The sum over layers."""
    counts = [vars(layer) for layer in layers]
    return AheadCounters(**{each.name: sum(count[each.name] for count in counts) for each in fields(AheadCounters)})


@dataclass
class Counters:
    """Counts of one model since it was loaded or `reset`."""

    layers: list[LayerCounters]
    compute_s: float = 0.0
    stall_s: float = 0.0
    steps: int = 0
    """Calls of the model."""
    achieved_s: float = 0.0
    """Seconds of all of them."""
    last_calls: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=MOST_CALLS))
    """Seconds and tokens of the last ones."""
    started_s: float = field(default_factory=time.perf_counter)

    def reset(self) -> None:
        for layer in self.layers:
            layer.hits = layer.misses = layer.bytes_read = 0
        self.compute_s = self.stall_s = 0.0
        self.steps, self.achieved_s = 0, 0.0
        self.last_calls.clear()

    def end_call(self, seconds: float, num_tokens: int) -> None:
        """Count one call of the model."""
        self.steps += 1
        self.achieved_s += seconds
        self.last_calls.append((seconds, num_tokens))

    def summary(self) -> dict[str, Any]:
        """Totals, rates and latency percentiles, JSON-serialisable."""
        hits = sum(layer.hits for layer in self.layers)
        misses = sum(layer.misses for layer in self.layers)
        decode_s = sorted(seconds for seconds, tokens in self.last_calls if tokens == 1)
        return {
            "hits": hits,
            "misses": misses,
            "hit_rate": hits / max(hits + misses, 1),
            "bytes_read": sum(layer.bytes_read for layer in self.layers),
            "compute_s": self.compute_s,
            "stall_s": self.stall_s,
            "steps": self.steps,
            "decode_s_p50": _quantile(decode_s, 0.50),
            "decode_s_p95": _quantile(decode_s, 0.95),
            "decode_s_p99": _quantile(decode_s, 0.99),
        }


def _quantile(ordered: list[float], share: float) -> float | None:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else None
