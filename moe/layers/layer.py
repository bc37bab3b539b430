"""The feed-forward part of a decoder layer: FeedForward, or a RoutedLayer such as MoELayer.

Shapes: T tokens, D model width, R routable experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from routing import Carry, Router, RouterStats, Routing, RoutingContext, SoftRouter

from ..experts.bank import Experts
from ..experts.zero_compute import ZeroComputeExperts
from ..parts.config import MoEConfig
from ..parts.flops import LayerFlops, projection_flops
from ..parts.linear import Linear


class FeedForward(nn.Module):
    """A plain gated feed-forward network, for dense layers and shared experts.

    Args:
        width: D, of inputs and outputs.
        inner_width: hidden units.
        activation: name of the gate's activation.
    """

    def __init__(self, width: int, inner_width: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner_width)
        self.up_proj = Linear(width, inner_width)
        self.down_proj = Linear(inner_width, width)
        self.act_fn = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class RoutedLayer(nn.Module):
    """The contract of every layer that routes.

    Its forward takes [T, D] normed tokens, the carry and the context, and returns [T, D], the carry for the next routed
    layer and the statistics of its routers' calls, one per router in the order of `routers`.

    `adds_to_stream` says whether the result is added to the residual stream, or replaces it.
    """

    adds_to_stream = True

    @property
    def routers(self) -> list[nn.Module]:
        """The routers that this layer asks, in the order of its statistics."""
        raise NotImplementedError

    def expect(self, context: RoutingContext) -> None:
        """A pass begins: what this layer looks up by token ids alone can be fetched from now on."""

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, list[RouterStats]]:
        raise NotImplementedError

    def flops(self, loads: Sequence[Tensor], passes: float) -> LayerFlops:
        """Operations of this layer per token, without its routers.

        Args:
            loads: per router, [R] slots per token of the text that were computed, summed over the router's calls.
            passes: how often a token of the text passes this layer on average.
        """
        raise NotImplementedError


class ExpertBank(RoutedLayer):
    """One bank of experts, with shared and zero-compute experts if the config has any.

    Args:
        config: the model's config.
        experts: the bank itself, if not plain `Experts`.
    """

    def __init__(self, config: MoEConfig, experts: nn.Module | None = None) -> None:
        super().__init__()
        self.experts = Experts(config) if experts is None else experts
        # tells transformers' own implementations that ids may reach E (dropped tokens, zero-compute experts)
        self.experts._is_expert_parallel = True
        shared_width = config.num_shared_experts * config.moe_intermediate_size
        self.shared = FeedForward(config.hidden_size, shared_width, config.hidden_act) if shared_width else None
        kinds = config.zero_compute_experts
        self.zero_compute = ZeroComputeExperts(kinds, config.hidden_size) if kinds else None

    def compute(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, D]: the weighted sum of the routed experts' outputs, plus those of zero-compute and shared experts."""
        y_TD = self.experts(x_TD, *routing.ffn_view())
        if self.zero_compute is not None:
            y_TD = y_TD + self.zero_compute(x_TD, routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD

    def flops(self, loads: Sequence[Tensor], passes: float) -> LayerFlops:
        E, D, _ = self.experts.down_proj.shape
        kinds = self.zero_compute.kinds if self.zero_compute is not None else ()
        per_kind = {"zero": 0, "copy": 2 * D, "constant": 2 * 2 * D + 4 * D}  # mixing scores, then a1 x + a2 v added
        return LayerFlops(
            experts=sum(self.experts.flops(load_R[:E]) for load_R in loads),
            shared=passes * projection_flops(self.shared),
            zero_compute=sum(
                load * per_kind[kind] for load_R in loads for kind, load in zip(kinds, load_R[E:].tolist(), strict=True)
            ),
        )


class MoELayer(ExpertBank):
    """An expert bank with one router.

    Args:
        config: the model's config.
        router: this layer's router.
        experts: the bank itself, if not plain `Experts`.
    """

    def __init__(self, config: MoEConfig, router: Router, experts: nn.Module | None = None) -> None:
        super().__init__(config, experts)
        self.router = router

    @property
    def routers(self) -> list[nn.Module]:
        return [self.router]

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, list[RouterStats]]:
        routing, carry, stats = self.router(x_TD, carry, context)
        return self.compute(x_TD, routing), carry, [stats]


class SoftMoELayer(MoELayer):
    """Soft MoE: experts compute slots, which are mixtures of a sequence's tokens; tokens read mixtures of slots.

    Source: Puigcerver et al. 2023, arXiv:2308.00951, eqs. 1-3.
    """

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, list[RouterStats]]:
        mix, carry, stats = self.router(x_TD, carry, context)
        B, _, Q = mix.dispatch_BSQ.shape
        slot_BQD = mix.dispatch_BSQ.mT.to(x_TD.dtype) @ x_TD.unflatten(0, (B, -1))
        expert_N1 = mix.expert_Q.repeat(B)[:, None]
        weight_N1 = torch.ones(B * Q, 1, device=x_TD.device)
        slot_ND = self.experts(slot_BQD.flatten(0, 1), expert_N1, weight_N1)
        y_TD = (mix.combine_BSQ.to(x_TD.dtype) @ slot_ND.unflatten(0, (B, Q))).flatten(0, 1)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD, carry, [stats]


def build_moe_layer(config: MoEConfig, router: Router | SoftRouter, experts: nn.Module | None = None) -> MoELayer:
    """The kind of layer that a router needs, with plain experts unless others are given."""
    return (SoftMoELayer if isinstance(router, SoftRouter) else MoELayer)(config, router, experts)
