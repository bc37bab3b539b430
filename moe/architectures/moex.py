"""MoE-X: wide rectified experts, and a router without parameters that sends each token where fewest units fire."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..experts.relu import ReluExperts
from ..layers.layer import MoELayer
from ..parts.config import MoEConfig
from ..parts.flops import LayerFlops
from .body import Body
from .sparsity_router import SparsityRouter


class MoEXLayer(MoELayer):
    """A MoELayer whose router reads the statistics of its experts' weights.

    Args:
        layer: which MoE layer this is.
    """

    def __init__(self, config: MoEConfig, layer: int) -> None:
        experts = ReluExperts(config)
        super().__init__(config, SparsityRouter(config.router_sizes, layer, experts), experts)

    def flops(self, loads: Sequence[Tensor], passes: float) -> LayerFlops:
        """The two products with the router's statistics, which are no parameters, count as shared."""
        found = super().flops(loads, passes)
        return replace(found, shared=found.shared + passes * 4.0 * self.router.mean_ED.numel())


def moex(config: MoEConfig) -> Body:
    """ReLU experts routed by predicted sparsity; `router` and `hidden_act` of the config are not used by them.

    Raises:
        ValueError: if the config has zero-compute experts.

    Source: Yang et al. 2025 (MoE-X), arXiv:2503.07639.
    """
    return Body(layers=[MoEXLayer(config, layer) for layer in range(config.num_moe_layers)])
