"""What is in fast memory now: expert store, caches, cost model, runtime.

`load` and `Offload` need torch and are imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

from .budget import format_size, parse_size
from .cache import CACHES, make_cache
from .calibrate import disk_bandwidth
from .simulate import Simulated, simulate

if TYPE_CHECKING:
    from .handle import Offload
    from .loading import load

__all__ = [
    "CACHES",
    "Offload",
    "Simulated",
    "disk_bandwidth",
    "format_size",
    "load",
    "make_cache",
    "parse_size",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name == "load":
        from .loading import load

        return load
    if name == "Offload":
        from .handle import Offload

        return Offload
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
