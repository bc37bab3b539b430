"""MoDE: experts chosen by a condition (noise level, task), which can be fused into one network per condition.

Source: Reuss et al. 2024, arXiv:2412.12953, section 3; `moe.fused_experts` is the cache.
"""

from functools import partial

from routing import ConditionRouter

from ..layers.layer import build_moe_layer
from ..parts.config import MoEConfig
from .body import Body
from .rescored import rescored_routers


def mode(config: MoEConfig, *, reads: str = "condition", inner_width: int | None = None, samples: bool = True) -> Body:
    """Mixture-of-experts layers whose routers read the call's condition; see `routing.ConditionRouter`."""
    kind = partial(ConditionRouter, reads=reads, inner_width=inner_width, samples=samples)  # type: ignore[arg-type]
    return Body(layers=[build_moe_layer(config, router) for router in rescored_routers(config, kind)])
