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
    from .condition import ConditionRouter
    from .fixed import ForcedRouter
    from .gathered import gather_dot, gather_sum
    from .glider import GliderRouter, task_bias
    from .ground.c_library import compile_library, processor_fact
    from .losses import BALANCE_LOSSES, auxiliary_loss, scheduled_weight, switch_balance_loss, z_loss
    from .marginals import MarginalStats
    from .modality import ModalityRouter, modality_of
    from .nulls import copy_ffn_rows_to_nulls, expected_true_load
    from .pooled import PooledRouter
    from .pregate import PreGate, planned_experts
    from .product_key import ProductKeyRouter
    from .router import Carry, ExactBuffers, Router, RouterModule, RouterSizes, RoutingContext, at_least_float32
    from .rule import ClassicRule
    from .soft import SoftRouter
    from .stats import RouterStats
    from .top_k import top_experts
    from .tucker_key import TuckerKeyRouter

_HOME = {
    "Routing": ".assignment",
    "CAPACITY_POLICIES": ".capacity",
    "limit_capacity": ".capacity",
    "ForcedRouter": ".fixed",
    "copy_ffn_rows_to_nulls": ".nulls",
    "expected_true_load": ".nulls",
    "PreGate": ".pregate",
    "planned_experts": ".pregate",
    "ROUTERS": ".catalogue",
    "build_routers": ".catalogue",
    "ClassicRouter": ".classic",
    "expect_router": ".catalogue",
    "BALANCE_LOSSES": ".losses",
    "ClassicRule": ".rule",
    "at_least_float32": ".router",
    "auxiliary_loss": ".losses",
    "compile_library": ".ground.c_library",
    "processor_fact": ".ground.c_library",
    "scheduled_weight": ".losses",
    "switch_balance_loss": ".losses",
    "z_loss": ".losses",
    "Carry": ".router",
    "ExactBuffers": ".router",
    "Router": ".router",
    "RouterSizes": ".router",
    "RouterModule": ".router",
    "RouterStats": ".stats",
    "SoftRouter": ".soft",
    "RoutingContext": ".router",
    "ConditionRouter": ".condition",
    "GliderRouter": ".glider",
    "task_bias": ".glider",
    "ModalityRouter": ".modality",
    "modality_of": ".modality",
    "PooledRouter": ".pooled",
    "MarginalStats": ".marginals",
    "ProductKeyRouter": ".product_key",
    "TuckerKeyRouter": ".tucker_key",
    "gather_dot": ".gathered",
    "gather_sum": ".gathered",
    "top_experts": ".top_k",
}

__all__ = [
    "BALANCE_LOSSES",
    "CAPACITY_POLICIES",
    "ROUTERS",
    "Carry",
    "ClassicRouter",
    "ClassicRule",
    "ConditionRouter",
    "ExactBuffers",
    "ForcedRouter",
    "GliderRouter",
    "MarginalStats",
    "ModalityRouter",
    "PooledRouter",
    "PreGate",
    "ProductKeyRouter",
    "Router",
    "RouterModule",
    "RouterSizes",
    "RouterStats",
    "Routing",
    "RoutingContext",
    "RoutingTrace",
    "SoftRouter",
    "TuckerKeyRouter",
    "at_least_float32",
    "auxiliary_loss",
    "build_routers",
    "compile_library",
    "copy_ffn_rows_to_nulls",
    "expect_router",
    "expected_true_load",
    "gather_dot",
    "gather_sum",
    "limit_capacity",
    "modality_of",
    "planned_experts",
    "processor_fact",
    "scheduled_weight",
    "switch_balance_loss",
    "task_bias",
    "top_experts",
    "z_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
