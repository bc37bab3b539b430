"""Latent experts (MoLE, MoLAE): experts of a group share the projections that they read the token through."""

from routing import build_routers

from ..experts.latent import LatentExperts
from ..layers.layer import build_moe_layer
from ..parts.config import MoEConfig
from .body import Body


def latent(config: MoEConfig, *, group: int = 4, rank: int | None = None) -> Body:
    """Any router, and experts whose gate and up projections read latents of width `rank` (a quarter of D if None).

    Raises:
        ValueError: if `group` exceeds the experts or `rank` the width.

    Source: Liu et al. 2025 (MoLAE), arXiv:2503.23100.
    """
    rank = max(1, config.hidden_size // 4) if rank is None else rank
    routers = build_routers(config.router, config.router_sizes, config.router_options)
    return Body(layers=[build_moe_layer(config, router, LatentExperts(config, group, rank)) for router in routers])
