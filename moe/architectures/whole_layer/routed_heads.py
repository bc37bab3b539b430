"""Attention heads as experts: some heads serve every token, a router weighs the others, before one output projection.

    y = sum over shared heads i of b_1 softmax(W_s x)_i O_i + sum over routed heads j of b_2 w_j O_j
    b = softmax(W_h x)

With the router `remoe` w_j = ReLU(W_r x)_j, and the token decides how many heads; with `olmoe` the K best of a softmax.

Source: Jin et al. 2024 (MoH), arXiv:2410.11842, section 3.2; ReLU routing of heads: PVChat 2025, arXiv:2503.17069. The
texts' equations were not at hand: those of MoH are as remembered, and PVChat's video losses are not here.

Shapes: B batch, S positions, T = B * S tokens, D model width, E experts (routed heads), H attention heads, A = width of
a head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from routing import Carry, RouterModule, RouterStats, Routing, build_routers

from ...layers.layer import FeedForward, RoutedLayer
from ...layers.stack import StackInputs
from ...parts.attention import Attention, rotate
from ...parts.config import MoEConfig
from ...parts.flops import LayerFlops, projection_flops
from ...parts.norm import RMSNorm
from ..body import Body


def routed_heads(config: MoEConfig, *, shared_heads: int = 0) -> Body:
    """A dense feed-forward network per layer, under attention whose heads are routed.

    Args:
        config: `num_experts` heads are routed, the other `shared_heads` of `num_attention_heads` are not.
        shared_heads: heads of every token, the first ones.

    Raises:
        ValueError: if the numbers of heads do not add up, or the router is not one of tokens to heads.
    """
    if shared_heads < 0 or shared_heads + config.num_experts != config.num_attention_heads:
        raise ValueError(
            f"shared_heads ({shared_heads}) and num_experts ({config.num_experts}), the routed heads, must add up to "
            f"num_attention_heads ({config.num_attention_heads})"
        )
    if config.zero_compute_experts or config.num_shared_experts or config.num_dense_layers:
        raise ValueError("routed heads have no zero-compute or shared experts and no dense layers; use shared_heads")
    routers = build_routers(config.router, config.router_sizes, config.router_options)
    if not all(isinstance(router, RouterModule) for router in routers) or config.router == "soft_moe":
        raise ValueError(f"routed heads need a router of tokens to heads; got {config.router!r}")
    return Body(
        layers=[RoutedHeads(config, router, shared_heads) for router in routers], decoder_layer=RoutedHeadsDecoderLayer
    )


class RoutedHeads(RoutedLayer):
    """The router of a layer's heads, and the dense feed-forward network that follows them.

    Args:
        router: of tokens to the routed heads.
        shared_heads: heads of every token, which come first.
    """

    def __init__(self, config: MoEConfig, router: RouterModule, shared_heads: int) -> None:
        super().__init__()
        self.router, self.shared_heads = router, shared_heads
        self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)
        D = config.hidden_size
        self.shared_gate = nn.Parameter(torch.empty(shared_heads, D)) if shared_heads else None
        self.kind_gate = nn.Parameter(torch.empty(2, D)) if shared_heads else None

    @property
    def routers(self) -> list[nn.Module]:
        return [self.router]

    def weights(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """[T, H]: the weight of each head, 0 where the token does not visit it."""
        weight_TE = routing.weight_TK.new_zeros(len(x_TD), routing.num_routable + 1)
        weight_TE = weight_TE.scatter_add(1, routing.expert_TK, routing.weight_TK)[:, :-1]
        if self.shared_gate is None:
            return weight_TE
        x_TD = x_TD.to(weight_TE.dtype)
        shared = linear(x_TD, self.shared_gate.to(x_TD.dtype)).softmax(dim=-1)
        kind_T2 = linear(x_TD, self.kind_gate.to(x_TD.dtype)).softmax(dim=-1)
        return torch.cat([shared * kind_T2[:, :1], weight_TE * kind_T2[:, 1:]], dim=-1)

    def flops(self, loads: Sequence[Tensor], passes: float) -> LayerFlops:
        """The feed-forward network and the gates; heads that are not visited are computed and weighed by 0."""
        gates = sum(gate.numel() for gate in (self.shared_gate, self.kind_gate) if gate is not None)
        return LayerFlops(shared=passes * (projection_flops(self.feed_forward) + 2 * gates))


class RoutedAttention(Attention):
    """Attention whose heads are weighed, token by token, before the output projection."""

    def attend(self, x_BSD: Tensor, weight_TH: Tensor, inputs: StackInputs) -> Tensor:
        """[B, S, D]; appends this step's keys and values to the cache."""
        query = rotate(self._normed_heads(self.q_proj(x_BSD), self.q_norm), *inputs.angles)
        key, value = self.keys_values(x_BSD, inputs.angles, inputs.cache)
        y_BSHA, _ = sdpa_attention_forward(self, query, key, value, inputs.mask, scaling=self.head_dim**-0.5)
        weight = weight_TH.to(y_BSHA.dtype).view(*y_BSHA.shape[:3], 1)
        return self.o_proj((y_BSHA * weight).flatten(2))


class RoutedHeadsDecoderLayer(nn.Module):
    """Pre-norm attention with routed heads, then a feed-forward network.

    Args:
        layer_idx: its place in the decoder.
        mlp: holds the router of the heads and the feed-forward network.
    """

    def __init__(self, config: MoEConfig, layer_idx: int, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = RoutedAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x_BSD: Tensor, carry: Carry, inputs: StackInputs) -> tuple[Tensor, Carry, list[RouterStats]]:
        normed_BSD = self.input_layernorm(x_BSD)
        normed_TD = normed_BSD.flatten(0, 1)
        routing, carry, stats = self.mlp.router(normed_TD, carry, inputs.context)
        x_BSD = x_BSD + self.self_attn.attend(normed_BSD, self.mlp.weights(normed_TD, routing), inputs)
        return x_BSD + self.mlp.feed_forward(self.post_attention_layernorm(x_BSD)), carry, [stats]
