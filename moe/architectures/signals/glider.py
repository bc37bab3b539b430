"""Glider: layer-normed local gates, to which a request may add one bias per expert.

Source: Li et al. 2024, arXiv:2410.07172; the bias is `routing.task_bias`, given as `logit_bias_LR` of a call.
"""

from routing import GliderRouter

from ...layers.layer import build_moe_layer
from ...parts.config import MoEConfig
from ..body import Body
from .rescored import rescored_routers


def glider(config: MoEConfig) -> Body:
    """Mixture-of-experts layers with Glider's gates; as published, top-2 of a softmax, renormalised."""
    return Body(layers=[build_moe_layer(config, router) for router in rescored_routers(config, GliderRouter)])
