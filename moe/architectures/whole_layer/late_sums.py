"""Sums that arrive late, so that what they are gathered from can travel while the next module computes.

A ladder reads, in every module, the stream without what the module before it adds. With module i alternately attention
and feed-forward,

    x_i = x_(i-1) + h_i(x_(i-2)),   x_(-1) = x_0

so an all-reduce of h_(i-1) has the time of h_i. With a shortcut only experts are late: a layer's attention reads the
stream without the experts of the layer before it, whose rows travel meanwhile, and its experts read all of it.

    a_l = x_l + attention(x_l),   m_l = experts(a_l + m_(l-1)),   x_(l+1) = a_l + m_(l-1)

Source: Zhang et al. 2025 (Ladder-residual), arXiv:2501.06589, eq. 2; Cai et al. 2024 (ScMoE), arXiv:2404.05019, and
Meituan 2025 (LongCat-Flash), arXiv:2509.01322, whose layers have a dense network in the meantime as well. Their
equations were not at hand; which stream each module reads is as reference works describe it.

Shapes: B batch, S positions, T = B * S tokens, D model width.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from routing import Carry, RouterStats

from ...layers.layer import FeedForward
from ...layers.stack import Stack, StackInputs, StackOutput
from ...parts.attention import Attention
from ...parts.config import MoEConfig
from ...parts.norm import RMSNorm
from ..body import Body
from ..plain import plain


def ladder(config: MoEConfig) -> Body:
    """The plain architecture, in which every module reads the stream without the sum of the module before it."""
    return replace(plain(config), stack=LateStack(), decoder_layer=partial(LateLayer, is_ladder=True))


def shortcut(config: MoEConfig) -> Body:
    """The plain architecture, in which attention reads the stream without the experts of the layer before it."""
    return replace(plain(config), stack=LateStack(), decoder_layer=partial(LateLayer, is_ladder=False))


class LateStack(Stack):
    """Runs the layers on two streams: what has been added, and what is yet to be."""

    def forward(self, layers: Sequence[nn.Module], x_BSD: Tensor, carry: Carry, inputs: StackInputs) -> StackOutput:
        start = torch.stack([x_BSD, torch.zeros_like(x_BSD)])
        output = super().forward(layers, start, carry, inputs)
        return replace(output, x_BSD=output.x_BSD.sum(dim=0))


class LateLayer(nn.Module):
    """A decoder layer of the usual parts whose input and output are both streams of `LateStack`, [2, B, S, D].

    Args:
        config: the model's config.
        layer_idx: the layer's place.
        mlp: a routed layer, or a dense network.
        is_ladder: whether attention is late as well as the feed-forward, or experts only.
    """

    def __init__(self, config: MoEConfig, layer_idx: int, mlp: nn.Module, *, is_ladder: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp, self.is_ladder = mlp, is_ladder

    def forward(self, x_2BSD: Tensor, carry: Carry, inputs: StackInputs) -> tuple[Tensor, Carry, list[RouterStats]]:
        x_BSD, late_BSD = x_2BSD
        attended_BSD = self.self_attn(self.input_layernorm(x_BSD), inputs.angles, inputs.mask, inputs.cache)
        x_BSD = x_BSD + late_BSD
        if not self.is_ladder:
            x_BSD = x_BSD + attended_BSD
        normed_BSD = self.post_attention_layernorm(x_BSD)
        stats: list[RouterStats] = []
        is_dense = isinstance(self.mlp, FeedForward)
        if is_dense:
            fed_BSD = self.mlp(normed_BSD)
        else:
            y_TD, carry, stats = self.mlp(normed_BSD.flatten(0, 1), carry, inputs.context)
            fed_BSD = y_TD.view_as(x_BSD)
        if self.is_ladder:
            return torch.stack([x_BSD + attended_BSD, fed_BSD]), carry, stats
        if is_dense:
            return torch.stack([x_BSD + fed_BSD, torch.zeros_like(x_BSD)]), carry, stats
        return torch.stack([x_BSD, fed_BSD]), carry, stats
