"""Who goes where: routings, routers, balance losses, routing traces.

Names that need torch are imported on first use, so that `routing.traces` works without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .traces import RoutingTrace

if TYPE_CHECKING:
    from .choice.plain_tensors import has_known_values, has_plain_memory, is_transformed
    from .choice.table_rows import gather_dot, gather_sum
    from .choice.top_k import top_experts
    from .contract.assignment import Routing
    from .contract.router import (
        Carry,
        ExactBuffers,
        Router,
        RouterModule,
        RouterSizes,
        RoutingContext,
        at_least_float32,
    )
    from .contract.stats import RouterStats
    from .ground.c_library import compile_library, processor_fact
    from .losses.balance import BALANCE_LOSSES, auxiliary_loss, scheduled_weight, switch_balance_loss, z_loss
    from .losses.capacity import CAPACITY_POLICIES, limit_capacity
    from .losses.marginals import MarginalStats
    from .routers.catalogue import ROUTERS, build_routers, expect_router
    from .routers.classic.classic import ClassicRouter
    from .routers.classic.condition import ConditionRouter
    from .routers.classic.glider import GliderRouter, task_bias
    from .routers.classic.nulls import copy_ffn_rows_to_nulls, expected_true_load
    from .routers.classic.pooled import PooledRouter
    from .routers.classic.rule import ClassicRule
    from .routers.own_rules.fixed import ForcedRouter
    from .routers.own_rules.modality import ModalityRouter, modality_of
    from .routers.own_rules.pregate import PreGate, planned_experts
    from .routers.own_rules.soft import SoftRouter
    from .routers.tables.product_key import ProductKeyRouter
    from .routers.tables.tucker_key import TuckerKeyRouter

_HOME = {
    "Routing": ".contract.assignment",
    "CAPACITY_POLICIES": ".losses.capacity",
    "limit_capacity": ".losses.capacity",
    "ForcedRouter": ".routers.own_rules.fixed",
    "copy_ffn_rows_to_nulls": ".routers.classic.nulls",
    "expected_true_load": ".routers.classic.nulls",
    "PreGate": ".routers.own_rules.pregate",
    "planned_experts": ".routers.own_rules.pregate",
    "ROUTERS": ".routers.catalogue",
    "build_routers": ".routers.catalogue",
    "ClassicRouter": ".routers.classic.classic",
    "expect_router": ".routers.catalogue",
    "BALANCE_LOSSES": ".losses.balance",
    "ClassicRule": ".routers.classic.rule",
    "at_least_float32": ".contract.router",
    "auxiliary_loss": ".losses.balance",
    "compile_library": ".ground.c_library",
    "processor_fact": ".ground.c_library",
    "scheduled_weight": ".losses.balance",
    "switch_balance_loss": ".losses.balance",
    "z_loss": ".losses.balance",
    "Carry": ".contract.router",
    "ExactBuffers": ".contract.router",
    "Router": ".contract.router",
    "RouterSizes": ".contract.router",
    "RouterModule": ".contract.router",
    "RouterStats": ".contract.stats",
    "SoftRouter": ".routers.own_rules.soft",
    "RoutingContext": ".contract.router",
    "ConditionRouter": ".routers.classic.condition",
    "GliderRouter": ".routers.classic.glider",
    "task_bias": ".routers.classic.glider",
    "ModalityRouter": ".routers.own_rules.modality",
    "modality_of": ".routers.own_rules.modality",
    "PooledRouter": ".routers.classic.pooled",
    "MarginalStats": ".losses.marginals",
    "ProductKeyRouter": ".routers.tables.product_key",
    "TuckerKeyRouter": ".routers.tables.tucker_key",
    "has_known_values": ".choice.plain_tensors",
    "has_plain_memory": ".choice.plain_tensors",
    "is_transformed": ".choice.plain_tensors",
    "gather_dot": ".choice.table_rows",
    "gather_sum": ".choice.table_rows",
    "top_experts": ".choice.top_k",
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
    "has_known_values",
    "has_plain_memory",
    "is_transformed",
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
