"""Who goes where: routings, routers, balance losses, routing traces.

Names that need torch are imported on first use, so that `routing.traces` works without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .traces import RoutingTrace

if TYPE_CHECKING:
    from .assignment import Routing
    from .capacity import CAPACITY_POLICIES, limit_capacity
    from .catalogue import ROUTERS, build_routers
    from .classic import ClassicRouter, ClassicRule
    from .losses import auxiliary_loss, switch_balance_loss, z_loss
    from .router import Carry, Router, RouterSizes, RouterStats, RoutingContext, router_stats

_HOME = {
    "Routing": ".assignment",
    "CAPACITY_POLICIES": ".capacity",
    "limit_capacity": ".capacity",
    "ROUTERS": ".catalogue",
    "build_routers": ".catalogue",
    "ClassicRouter": ".classic",
    "ClassicRule": ".classic",
    "auxiliary_loss": ".losses",
    "switch_balance_loss": ".losses",
    "z_loss": ".losses",
    "Carry": ".router",
    "Router": ".router",
    "RouterSizes": ".router",
    "RouterStats": ".router",
    "RoutingContext": ".router",
    "router_stats": ".router",
}

__all__ = [
    "CAPACITY_POLICIES",
    "ROUTERS",
    "Carry",
    "ClassicRouter",
    "ClassicRule",
    "Router",
    "RouterSizes",
    "RouterStats",
    "Routing",
    "RoutingContext",
    "RoutingTrace",
    "auxiliary_loss",
    "build_routers",
    "limit_capacity",
    "router_stats",
    "switch_balance_loss",
    "z_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
