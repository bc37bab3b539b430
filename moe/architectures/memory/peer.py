"""PEER: a million experts of one neuron each, found by product keys.

Source: He 2024, arXiv:2407.04153, sections 2.1-2.3; y = sum over heads and their K experts of g_i act(u_i . x) v_i.

Shapes: T tokens, D model width, N experts (`config.num_experts`), K experts per token over all heads.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from routing import Carry, MarginalStats, ProductKeyRouter, Routing, RoutingContext, gather_dot, gather_sum

from ...layers.layer import FeedForward, RoutedLayer
from ...parts.config import MoEConfig
from ...parts.flops import LayerFlops, projection_flops
from ..body import Body


def peer(
    config: MoEConfig,
    *,
    num_heads: int = 8,
    key_width: int = 128,
    query_norm: str = "batch",
    activation: str = "gelu",
    grid_loss: str = "none",
) -> Body:
    """A PEER layer in every routed place; `num_experts` is N, a square, and `num_experts_per_tok` is K per head."""
    sizes = config.router_sizes
    routers = [
        ProductKeyRouter(sizes, layer, num_heads, key_width, query_norm, grid_loss)  # type: ignore[arg-type]
        for layer in range(sizes.num_layers)
    ]
    return Body(layers=[PeerLayer(config, router, activation) for router in routers])


class NeuronTable(nn.Module):
    """N experts of one neuron: what each reads, and what it writes.

    Args:
        num_experts: N, rows of both tables.
        width: D, the width of tokens in and out.
    """

    def __init__(self, num_experts: int, width: int) -> None:
        super().__init__()
        self.num_rows, self.readers = num_experts, 1
        self.down = nn.Parameter(torch.empty(num_experts, width))
        self.up = nn.Parameter(torch.empty(num_experts, width))


class PeerLayer(RoutedLayer):
    """A product-key router, N neurons, and a shared feed-forward network if the config has shared experts.

    Args:
        activation: of each neuron, by its name in transformers.
    """

    def __init__(self, config: MoEConfig, router: ProductKeyRouter, activation: str) -> None:
        super().__init__()
        if activation not in ACT2FN:
            raise ValueError(f"activation must be one that transformers names, such as gelu; got {activation!r}")
        self.router = router
        self.experts = NeuronTable(config.num_experts, config.hidden_size)
        self.act_fn = ACT2FN[activation]
        self.shared = shared_feed_forward(config)

    @property
    def routers(self) -> list[nn.Module]:
        return [self.router]

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, list[MarginalStats]]:
        routing, carry, stats = self.router(x_TD, carry, context)
        with torch.autocast(x_TD.device.type, enabled=False):
            row_TK, weight_TK = table_rows(routing, context)
            neuron_TK = self.act_fn(gather_dot(x_TD.to(self.experts.down.dtype), self.experts.down, row_TK))
            y_TD = gather_sum(neuron_TK * weight_TK.to(neuron_TK.dtype), self.experts.up, row_TK).to(x_TD.dtype)
        return y_TD if self.shared is None else y_TD + self.shared(x_TD), carry, [stats]

    def flops(self, loads: Sequence[Tensor], passes: float) -> LayerFlops:
        per_token = self.router.num_heads * self.router.sizes.top_k * 4 * self.experts.down.shape[1]
        return LayerFlops(experts=passes * per_token, shared=passes * projection_flops(self.shared))


def table_rows(routing: Routing, context: RoutingContext) -> tuple[Tensor, Tensor]:
    """Rows and weights of a routing; the empty slots of padding read row 0 with weight 0."""
    if context.is_valid_T is None:
        return routing.expert_TK, routing.weight_TK
    return routing.expert_TK.masked_fill(~context.is_valid_T[:, None], 0), routing.weight_TK


def shared_feed_forward(config: MoEConfig) -> FeedForward | None:
    """The feed-forward network that stands beside the memory, as wide as the config's shared experts together."""
    width = config.num_shared_experts * config.moe_intermediate_size
    return FeedForward(config.hidden_size, width, config.hidden_act) if width else None
