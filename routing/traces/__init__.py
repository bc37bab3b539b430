"""Routing traces and their statistics; NumPy and SciPy only."""

from ..ground.files import atomic_write, write_json
from .affinity import coactivation_EE, transition_EE, used_TE
from .foresight import belady_hits_LC, segment_cache_rate_C, segment_cache_rate_LC
from .importers import IMPORTERS, import_trace, load_torch
from .load import entropy_L, load_LE, skew_L
from .reuse import NEVER, lru_hits_LC, next_use_TK, reuse_distance_TK
from .routing_trace import EMPTY, RoutingTrace
from .segments import SegmentRouting, longest_sequence, segment_routing

__all__ = [
    "EMPTY",
    "IMPORTERS",
    "NEVER",
    "RoutingTrace",
    "SegmentRouting",
    "atomic_write",
    "belady_hits_LC",
    "coactivation_EE",
    "entropy_L",
    "import_trace",
    "load_LE",
    "load_torch",
    "longest_sequence",
    "lru_hits_LC",
    "next_use_TK",
    "reuse_distance_TK",
    "segment_cache_rate_C",
    "segment_cache_rate_LC",
    "segment_routing",
    "skew_L",
    "transition_EE",
    "used_TE",
    "write_json",
]
