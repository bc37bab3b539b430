"""Who goes where: routings, routers, balance losses, routing traces.

Names that need torch are imported on first use, so that `routing.traces` works without it.
"""

from importlib import import_module
from typing import Any

from .traces import RoutingTrace

# What this package offers, by the module that has it; the one place to name a new export.
_OFFERS: dict[str, tuple[str, ...]] = {
    "choice.normalise": ("normalised",),
    "choice.plain_tensors": ("has_known_values", "has_plain_memory", "is_transformed"),
    "choice.table_rows": ("gather_dot", "gather_sum"),
    "choice.top_k": ("top_experts",),
    "contract.assignment": ("Routing",),
    "contract.context": ("Carry", "RoutingContext"),
    "contract.module": ("ExactBuffers", "RouterModule", "at_least_float32"),
    "contract.router": ("Router", "RouterSizes"),
    "contract.stats": ("RouterStats",),
    "ground.c_library": ("compile_library", "processor_fact"),
    "losses.balance": ("BALANCE_LOSSES", "auxiliary_loss", "scheduled_weight", "switch_balance_loss", "z_loss"),
    "losses.capacity": ("CAPACITY_POLICIES", "limit_capacity"),
    "losses.reuse": ("REUSE_LOSSES", "adjacent_reuse", "anchor_loss"),
    "losses.marginals": ("MarginalStats",),
    "routers.catalogue": ("ROUTERS", "build_routers", "expect_router"),
    "routers.classic.classic": ("ClassicRouter",),
    "routers.classic.condition": ("ConditionRouter",),
    "routers.classic.glider": ("GliderRouter", "task_bias"),
    "routers.classic.nulls": ("copy_ffn_rows_to_nulls", "expected_true_load"),
    "routers.classic.pooled": ("PooledRouter",),
    "routers.classic.rule": ("ClassicRule",),
    "routers.local.sequences": ("SequenceState",),
    "routers.options": ("Options", "read_options"),
    "routers.own_rules.fixed": ("ForcedRouter",),
    "routers.own_rules.modality": ("ModalityRouter", "modality_of"),
    "routers.own_rules.pregate": ("PreGate", "planned_experts"),
    "routers.own_rules.soft": ("SoftRouter",),
    "routers.row": ("RouterRow",),
    "routers.tables.product_key": ("ProductKeyRouter",),
    "routers.tables.tucker_key": ("TuckerKeyRouter",),
}
_HOME = {name: module for module, names in _OFFERS.items() for name in names}

__all__ = ["RoutingTrace", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
