"""Who goes where: routings, routers, balance losses, routing traces.

Names that need torch are imported on first use, so that `routing.traces` works without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .traces import RoutingTrace

if TYPE_CHECKING:
    from .assignment import Routing
    from .capacity import CAPACITY_POLICIES, limit_capacity
    from .catalogue import ROUTERS, build_routers, expect_router
    from .classic import ClassicRouter
    from .losses import BALANCE_LOSSES, auxiliary_loss, scheduled_weight, switch_balance_loss, z_loss
    from .router import Carry, Router, RouterModule, RouterSizes, RoutingContext
    from .rule import ClassicRule
    from .soft import SoftRouter
    from .stats import RouterStats

_HOME = {
    "Routing": ".assignment",
    "CAPACITY_POLICIES": ".capacity",
    "limit_capacity": ".capacity",
    "ROUTERS": ".catalogue",
    "build_routers": ".catalogue",
    "ClassicRouter": ".classic",
    "expect_router": ".catalogue",
    "BALANCE_LOSSES": ".losses",
    "ClassicRule": ".rule",
    "auxiliary_loss": ".losses",
    "scheduled_weight": ".losses",
    "switch_balance_loss": ".losses",
    "z_loss": ".losses",
    "Carry": ".router",
    "Router": ".router",
    "RouterSizes": ".router",
    "RouterModule": ".router",
    "RouterStats": ".stats",
    "SoftRouter": ".soft",
    "RoutingContext": ".router",
}

__all__ = [
    "BALANCE_LOSSES",
    "CAPACITY_POLICIES",
    "ROUTERS",
    "Carry",
    "ClassicRouter",
    "ClassicRule",
    "Router",
    "RouterModule",
    "RouterSizes",
    "RouterStats",
    "Routing",
    "RoutingContext",
    "RoutingTrace",
    "SoftRouter",
    "auxiliary_loss",
    "build_routers",
    "expect_router",
    "limit_capacity",
    "scheduled_weight",
    "switch_balance_loss",
    "z_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
