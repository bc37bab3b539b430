"""MoELayer: router, experts, shared and zero-compute experts of one decoder layer, on one screen.

Shapes: T tokens, D model width.
"""

from torch import Tensor, nn
from transformers.activations import ACT2FN

from routing import Carry, Router, RouterStats, RoutingContext

from .config import MoEConfig
from .experts import Experts
from .zero_compute import ZeroComputeExperts


class FeedForward(nn.Module):
    """A plain gated feed-forward network, for dense layers and shared experts.

    Args:
        width: D.
        inner_width: its hidden width.
        activation: name of the gate's activation.
    """

    def __init__(self, width: int, inner_width: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner_width, bias=False)
        self.up_proj = nn.Linear(width, inner_width, bias=False)
        self.down_proj = nn.Linear(inner_width, width, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class MoELayer(nn.Module):
    """Replaces the feed-forward network of a decoder layer.

    Args:
        config: the model's config.
        router: this layer's router.
    """

    def __init__(self, config: MoEConfig, router: Router) -> None:
        super().__init__()
        self.router = router
        self.experts = Experts(config)
        # tells transformers' own implementations that ids may reach E (dropped tokens, zero-compute experts)
        self.experts._is_expert_parallel = True
        shared_width = config.num_shared_experts * config.moe_intermediate_size
        self.shared = FeedForward(config.hidden_size, shared_width, config.hidden_act) if shared_width else None
        kinds = config.zero_compute_experts
        self.zero_compute = ZeroComputeExperts(kinds, config.hidden_size) if kinds else None

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, RouterStats]:
        """[T, D] to add to the residual stream, the carry for the next MoE layer, and the router's raw statistics."""
        routing, carry, stats = self.router(x_TD, carry, context)
        y_TD = self.experts(x_TD, *routing.ffn_view())
        if self.zero_compute is not None:
            y_TD = y_TD + self.zero_compute(x_TD, routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD, carry, stats
