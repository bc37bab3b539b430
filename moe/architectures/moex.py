"""MoE-X: wide rectified experts, and a router without parameters that sends each token where fewest units fire."""

from ..config import MoEConfig
from ..layer import MoELayer
from ..relu_experts import ReluExperts
from ..sparsity_router import SparsityRouter
from .body import Body


def moex(config: MoEConfig) -> Body:
    """ReLU experts routed by predicted sparsity; `router` and `hidden_act` of the config are not used by them.

    Raises:
        ValueError: if the config has zero-compute experts.

    Source: Yang et al. 2025 (MoE-X), arXiv:2503.07639.
    """
    layers = []
    for layer in range(config.num_moe_layers):
        experts = ReluExperts(config)
        layers.append(MoELayer(config, SparsityRouter(config.router_sizes, layer, experts), experts))
    return Body(layers=layers)
