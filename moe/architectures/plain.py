"""The plain architecture: one router and one bank of experts in every routed layer, layers run once and in order."""

from routing import build_routers

from ..layers.layer import build_moe_layer
from ..parts.config import MoEConfig
from .body import Body


def plain(config: MoEConfig) -> Body:
    """A mixture-of-experts layer per router. Source: Shazeer et al. 2017, arXiv:1701.06538."""
    routers = build_routers(config.router, config.router_sizes, config.router_options)
    return Body(layers=[build_moe_layer(config, router) for router in routers])
