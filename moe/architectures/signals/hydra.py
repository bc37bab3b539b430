"""Hydra's feed-forward part: experts chosen once per chunk, beside a factual memory found by product keys.

y = sum over the chunk's K experts of w_i FFN_i(x) + sum over heads and their best K places of s V, s a softmax.

Source: Hydra 2025, arXiv:2508.15099: one decision per chunk, a memory by product keys (Lample et al. 2019,
arXiv:1907.05242, eqs. 1-2). Only the abstract could be had: how causality is kept is ours, and the state-space
backbone, the sparse attention and the workspace are not here.

Shapes: T tokens, D model width, N rows of the memory.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from routing import Carry, PooledRouter, ProductKeyRouter, RouterStats, RoutingContext, gather_sum

from ...layers.layer import MoELayer, RoutedLayer, build_moe_layer
from ...parts.config import MoEConfig
from ...parts.flops import LayerFlops
from ..body import Body
from ..memory.peer import table_rows
from .rescored import rescored_routers


def hydra(
    config: MoEConfig,
    *,
    pooling: str = "previous_chunk",
    chunk: int = 16,
    first_chunk: str = "prefix",
    memory: int = 0,
    memory_top_k: int = 8,
    memory_heads: int = 2,
    memory_key_width: int = 32,
) -> Body:
    """Mixture-of-experts layers whose routers pool scores; see `routing.PooledRouter` for the first three options.

    Args:
        memory: N, values of a memory in each layer, a square; 0 for none.
        memory_top_k, memory_heads, memory_key_width: places per head, heads, and the width of a query or key.
    """
    kind = partial(  # type: ignore[arg-type]
        PooledRouter,
        pooling=pooling,
        chunk=chunk,
        first_chunk=first_chunk,
        first_cache_layer=config.num_hidden_layers,
    )
    layers: list[RoutedLayer] = [build_moe_layer(config, router) for router in rescored_routers(config, kind)]
    if memory:
        sizes = replace(config.router_sizes, num_experts=memory, top_k=memory_top_k, zero_compute=())
        keys = [
            ProductKeyRouter(sizes, layer, memory_heads, memory_key_width, query_norm="layer")
            for layer in range(sizes.num_layers)
        ]
        layers = [LayerWithMemory(layer, FactualMemory(key)) for layer, key in zip(layers, keys, strict=True)]
    return Body(layers=layers)


class FactualMemory(nn.Module):
    """N values of width D, of which each head reads the K whose keys fit the token best.

    Args:
        keys: finds the places, and weighs them.
    """

    def __init__(self, keys: ProductKeyRouter) -> None:
        super().__init__()
        self.keys = keys
        self.values = nn.Parameter(torch.empty(keys.sizes.num_experts, keys.sizes.width))

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        routing, _, _ = self.keys(x_TD, Carry(), replace(context, logit_bias_LR=None, top_k=None))
        with torch.autocast(x_TD.device.type, enabled=False):
            row_TK, weight_TK = table_rows(routing, context)
            return gather_sum(weight_TK.to(self.values.dtype), self.values, row_TK).to(x_TD.dtype)

    def flops(self) -> float:
        """Operations of a token: queries, keys, and the values that are summed."""
        sizes = self.keys.sizes
        return self.keys.flops() + 2.0 * self.keys.num_heads * sizes.top_k * sizes.width


class LayerWithMemory(RoutedLayer):
    """A mixture-of-experts layer and a memory, added up.

    Args:
        layer: the routed experts.
        memory: what is read beside them.
    """

    def __init__(self, layer: MoELayer, memory: FactualMemory) -> None:
        super().__init__()
        self.layer, self.memory = layer, memory

    @property
    def routers(self) -> list[nn.Module]:
        return self.layer.routers

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, list[RouterStats]]:
        y_TD, carry, stats = self.layer(x_TD, carry, context)
        return y_TD + self.memory(x_TD, context), carry, stats

    def flops(self, loads: Sequence[Tensor], passes: float) -> LayerFlops:
        own = self.layer.flops(loads, passes)
        return replace(own, shared=own.shared + passes * self.memory.flops())
