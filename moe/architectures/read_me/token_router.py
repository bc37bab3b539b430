"""One causal router for all layers: a small transformer over token ids, with a key/value cache of its own.

Shapes: B sequences, S positions, T = B * S tokens, D model width, E experts, K experts per token.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from routing import (
    Carry,
    RouterModule,
    RouterSizes,
    RouterStats,
    Routing,
    RoutingContext,
    at_least_float32,
    top_experts,
)

from ...layers.layer import FeedForward
from ...parts.attention import Attention, rotary_angles
from ...parts.config import MoEConfig
from ...parts.norm import RMSNorm

LOGITS = "token_router_logits"
WEIGHTS = ("one", "probability")


class TokenRouterBlock(nn.Module):
    """Pre-norm attention and feed-forward of the router's own width."""

    def __init__(self, config: MoEConfig, cache_index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, cache_index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, x_BSD: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), angles, mask, cache)
        return x_BSD + self.mlp(self.post_attention_layernorm(x_BSD))


class TokenTransformer(nn.Module):
    """A small causal transformer over token ids, without a head.

    Args:
        vocab_size: ids that there are.
        sizes: width, heads, blocks and feed-forward width, as a config of its own.
        first_cache_index: where the keys of its first block stand in a cache that it is given.
    """

    def __init__(self, vocab_size: int, sizes: MoEConfig, first_cache_index: int = 0) -> None:
        super().__init__()
        self.sizes, self.first_cache_index = sizes, first_cache_index
        self.embed_tokens = nn.Embedding(vocab_size, sizes.hidden_size)
        self.blocks = nn.ModuleList(
            TokenRouterBlock(sizes, first_cache_index + block) for block in range(sizes.num_hidden_layers)
        )
        self.norm = RMSNorm(sizes.hidden_size, eps=sizes.rms_norm_eps)

    def normed(self, context: RoutingContext) -> Tensor:
        """[T, D] in float32 or wider: what a head reads.

        Raises:
            ValueError: if the context has no token ids, or a cache that cannot grow.
        """
        if context.token_id_T is None or context.position_T is None or context.sequence_T is None:
            raise ValueError("this model routes by token ids; call it with input_ids, not with inputs_embeds")
        num_sequences = int(context.sequence_T[-1]) + 1
        token_BS, position_BS = (x.view(num_sequences, -1) for x in (context.token_id_T, context.position_T))
        angles = rotary_angles(position_BS, self.sizes.head_dim, self.sizes.rope_theta)
        self._make_room(context.cache)
        x_BSD = self.embed_tokens(token_BS)
        for block in self.blocks:
            x_BSD = block(x_BSD, angles, context.attention_mask, context.cache)
        with torch.autocast(x_BSD.device.type, enabled=False):
            return at_least_float32(self.norm(x_BSD)).flatten(0, 1)

    def _make_room(self, cache: Cache | None) -> None:
        if cache is None:
            return
        missing = self.first_cache_index + len(self.blocks) - len(cache.layers)
        if missing > 0 and not isinstance(cache, DynamicCache):
            raise ValueError(
                f"the router keeps its own keys and values beside the model's, which a {type(cache).__name__} has no "
                "room for; generate with the default (dynamic) cache"
            )
        cache.layers.extend(DynamicLayer() for _ in range(missing))


class TokenRouter(TokenTransformer):
    """Logits [T, E] of every token from the ids up to it; the same for all layers of the model that it routes.

    Its keys and values live in the model's own cache, after those of the decoder layers, so that what reorders or crops
    that cache treats them alike.

    Args:
        config: of the model that is routed.
        sizes: width, heads, blocks and feed-forward width of the router, as a config of its own.

    Source: Cai et al. 2024 (Read-ME), arXiv:2410.19123, section 3.2.
    """

    def __init__(self, config: MoEConfig, sizes: MoEConfig) -> None:
        super().__init__(config.vocab_size, sizes, config.num_hidden_layers)
        self.head = nn.Linear(sizes.hidden_size, config.num_experts, bias=False)
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.num_routed_layers = config.num_moe_layers

    def forward(self, context: RoutingContext) -> Tensor:
        """[T, E] in float32 or wider.

        Raises:
            ValueError: if the context has no token ids, or a cache that cannot grow.
        """
        x_TD = self.normed(context)
        with torch.autocast(x_TD.device.type, enabled=False):
            return linear(x_TD, self.head.weight.to(x_TD.dtype))

    def exact_plan(self, logit_TE: Tensor, context: RoutingContext) -> Mapping[int, Tensor]:
        """Every layer's experts, int64 [T, K] each, that what `forward` returned for this context fixes."""
        layers, bias_LR = range(self.num_routed_layers), context.logit_bias_LR
        if bias_LR is None:
            return dict.fromkeys(layers, top_experts(logit_TE, self.top_k))
        return {layer: top_experts(logit_TE + bias_LR[layer].to(logit_TE.dtype), self.top_k) for layer in layers}

    def plan_of_ids(self, token_BS: Tensor) -> Tensor:
        """Every layer's experts for whole sequences of token ids, int64 [T, K], without running the model."""
        return top_experts(self(context_of(token_BS)), self.top_k)


def context_of(token_BS: Tensor) -> RoutingContext:
    """What the router looks at in a pass over whole sequences of ids."""
    B, S = token_BS.shape
    return RoutingContext(
        token_id_T=token_BS.flatten(),
        position_T=torch.arange(S, device=token_BS.device).repeat(B),
        sequence_T=torch.arange(B, device=token_BS.device).repeat_interleave(S),
    )


class SharedRouter(RouterModule):
    """One layer's view of a TokenRouter; the first layer's owns it and asks it once per forward pass.

    Args:
        sizes: of the routed layers; E, K and L are used.
        layer: which MoE layer this router serves.
        core: the router that all layers share.
        weigh: `one` leaves experts' outputs as they are, so that the language-model loss does not reach the router
            (published; K = 1); `probability` multiplies them by the softmax (a departure that trains the router).

    Raises:
        ValueError: if `weigh` is unknown, or K > 1 experts would count as one each.
    """

    balance_loss = "switch"
    has_fixed_top_k = True

    def __init__(self, sizes: RouterSizes, layer: int, core: TokenRouter, weigh: str) -> None:
        super().__init__(sizes, layer)
        if weigh not in WEIGHTS:
            raise ValueError(f"weigh must be one of {', '.join(WEIGHTS)}; got {weigh!r}")
        if weigh == "one" and sizes.top_k > 1:
            raise ValueError(
                f"weigh='one' adds up experts unweighted, so num_experts_per_tok must be 1; got {sizes.top_k} "
                "(weigh='probability' allows more)"
            )
        if sizes.zero_compute:
            raise ValueError("one router for all layers has no zero-compute experts; leave zero_compute_experts empty")
        self.weigh = weigh
        self.core = core if layer == 0 else None
        self._asked = (core,)  # registered in the first layer only; in a tuple, or torch would register it here

    def begin(self, context: RoutingContext) -> Carry:
        return Carry().put(**{LOGITS: self._asked[0](context)})

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        logit_TE = carry.get(LOGITS)
        if logit_TE is None:
            raise ValueError("the routing is made by `begin`, which must be called first")
        logit_TE = self.biased(logit_TE, context)
        probability_TE = logit_TE.softmax(dim=-1)
        expert_TK = top_experts(logit_TE.detach(), self.top_k(context))
        weight_TK = probability_TE.gather(-1, expert_TK)
        routing = self.routing(expert_TK, weight_TK if self.weigh == "probability" else torch.ones_like(weight_TK))
        if context.is_valid_T is not None:
            routing = routing.drop(~context.is_valid_T[:, None].expand_as(expert_TK))
        return routing, carry, self.stats(routing, routing, context, probability_TR=probability_TE, logit_TR=logit_TE)
