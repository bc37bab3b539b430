"""Routing traces and their statistics; NumPy and SciPy only."""

from .affinity import coactivation_EE, transition_EE, used_TE
from .files import atomic_write, write_json
from .importers import IMPORTERS, import_trace, load_torch
from .load import entropy_L, load_LE, skew_L
from .reuse import reuse_distance_TK
from .trace import EMPTY, RoutingTrace

__all__ = [
    "EMPTY",
    "IMPORTERS",
    "RoutingTrace",
    "atomic_write",
    "coactivation_EE",
    "entropy_L",
    "import_trace",
    "load_LE",
    "load_torch",
    "reuse_distance_TK",
    "skew_L",
    "transition_EE",
    "used_TE",
    "write_json",
]
