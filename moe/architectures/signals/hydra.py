"""Sequence- and chunk-level routing: tokens of a chunk, or of a sequence so far, share one decision.

Source: Hydra 2025, arXiv:2508.15099 (one decision per chunk); how causality is kept is ours.
"""

from functools import partial

from routing import PooledRouter

from ...layers.layer import build_moe_layer
from ...parts.config import MoEConfig
from ..body import Body
from .rescored import rescored_routers


def hydra(config: MoEConfig, *, pooling: str = "previous_chunk", chunk: int = 16) -> Body:
    """Mixture-of-experts layers whose routers pool scores; see `routing.PooledRouter` for the options."""
    kind = partial(PooledRouter, pooling=pooling, chunk=chunk, first_cache_layer=config.num_hidden_layers)  # type: ignore[arg-type]
    return Body(layers=[build_moe_layer(config, router) for router in rescored_routers(config, kind)])
