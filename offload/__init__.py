"""What is in fast memory now: expert store, caches, cost model, runtime.

`load` and `Offload` need torch and are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from routing.ground.quantity import format_size, parse_size

from .cache import CACHES, make_cache
from .simulate import Simulated, simulate

if TYPE_CHECKING:
    from .calibrate import disk_bandwidth
    from .gpu.calibrate import wire_bandwidth
    from .gpu.loading import open_lane
    from .handle import Offload
    from .loading import load
    from .packing import write_pack

_HOME = {
    "Offload": ".handle",
    "disk_bandwidth": ".calibrate",
    "load": ".loading",
    "open_lane": ".gpu.loading",
    "wire_bandwidth": ".gpu.calibrate",
    "write_pack": ".packing",
}

__all__ = [
    "CACHES",
    "Offload",
    "Simulated",
    "disk_bandwidth",
    "format_size",
    "load",
    "make_cache",
    "open_lane",
    "parse_size",
    "simulate",
    "wire_bandwidth",
    "write_pack",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
