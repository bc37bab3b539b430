"""Engram: some layers read large tables by the last token ids, whatever the hidden state, and gate what they read.

Which rows a token reads follows from token ids alone. Offloading reads them from the disk where memory is short.

Shapes: T tokens, B batch, S positions, D model width, I inputs of a projection, J places of an n-gram, N rows read per
token (one per length and head).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from routing import Carry, Router, RouterStats, RoutingContext, SequenceState, build_routers

from ...layers.layer import MoELayer
from ...parts.config import MoEConfig
from ...parts.flops import LayerFlops
from ...parts.linear import Linear
from ...parts.norm import RMSNorm
from ..body import Body, expect_choices

LENGTHS = (2, 3)
"""Of the n-grams, as published."""
NO_TOKEN = -1
"""Stands for what comes before a text."""


class NgramTables(nn.Module):
    """Rows by hashed n-grams, projected to a key and a value; the key's match with the token gates the value.

    `y = sigmoid(norm(key) . norm(x) / sqrt(D)) * value`. The published layer adds a short convolution and stands before
    attention; both are left out.

    Args:
        config: gives D and V.
        rows: of each length's and head's table.
        width: of a row.
        heads: hash functions per length.
        cache_layer: which layer of the key/value cache keeps the last token ids.
        seed: of the hash functions.

    Source: DeepSeek-AI 2026 (Engram), sections 2.2 and 2.3.
    """

    def __init__(self, config: MoEConfig, rows: int, width: int, heads: int, cache_layer: int, seed: int) -> None:
        super().__init__()
        self.rows, self.cache_layer, N = rows, cache_layer, len(LENGTHS) * heads
        self.table = nn.Parameter(torch.empty(N * rows, width))
        self.key = Linear(N * width, config.hidden_size)
        self.value = Linear(N * width, config.hidden_size)
        self.key_norm, self.token_norm = (RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(2))
        # odd factors below 2^31: products with ids below 2^24 do not overflow
        factor = np.random.default_rng(seed).integers(0, 2**30, (N, max(LENGTHS))) * 2 + 1
        is_read = np.arange(max(LENGTHS)) < np.repeat(LENGTHS, heads)[:, None]
        self.register_buffer("factor_NJ", torch.from_numpy(factor * is_read))

    def init_parameters(self, std: float) -> None:
        nn.init.normal_(self.table, std=std)

    def forward(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """[T, D]: what is added to the layer's output."""
        row_TN = self.row_TN(context)
        self._keep_tokens(context)
        read_TI = self.look_up(row_TN).flatten(1)
        match_T1 = (self.key_norm(self.key(read_TI)) * self.token_norm(x_TD)).sum(dim=-1, keepdim=True)
        return (match_T1 * x_TD.shape[1] ** -0.5).sigmoid() * self.value(read_TI)

    def look_up(self, row_TN: Tensor) -> Tensor:
        """[T, N, I / N]: rows of the table; offloading reads them one by one instead."""
        return nn.functional.embedding(row_TN, self.table)

    def expect_rows(self, row_TN: Tensor) -> None:
        """Told which rows a pass looks up, before its first layer computes; offloading starts to read them here."""

    def row_TN(self, context: RoutingContext) -> Tensor:
        """int64 rows that each token reads, of all tables behind each other.

        Raises:
            ValueError: if the call has no token ids, or a cache that cannot keep them.
        """
        token_BS = _tokens(context)
        earlier = SequenceState(context.cache, self.cache_layer).earlier(max(LENGTHS) - 1)
        known = token_BS if earlier is None else torch.cat([earlier[..., 0], token_BS], dim=1)
        S, reach = token_BS.shape[1], max(LENGTHS) - 1
        padded = nn.functional.pad(known, (reach, 0), value=NO_TOKEN)[:, -S - reach :]
        # the token itself first, then the ones before it
        gram_BSJ = padded.unfold(1, reach + 1, 1).flip(-1) + 1
        hashed_TN = (gram_BSJ.flatten(0, 1)[:, None] * self.factor_NJ).sum(dim=-1)
        hashed_TN = (hashed_TN ^ (hashed_TN >> 17)) % self.rows
        return hashed_TN + self.rows * torch.arange(len(self.factor_NJ), device=hashed_TN.device)

    def _keep_tokens(self, context: RoutingContext) -> None:
        """For later calls of the same sequences, whose n-grams reach back."""
        SequenceState(context.cache, self.cache_layer).append(_tokens(context)[..., None])


def _tokens(context: RoutingContext) -> Tensor:
    """[B, S] ids, NO_TOKEN where there is padding."""
    if context.token_id_T is None or context.sequence_T is None:
        raise ValueError("n-gram tables need token ids; call the model with input_ids, not with inputs_embeds")
    token_T = context.token_id_T
    if context.is_valid_T is not None:
        token_T = token_T.masked_fill(~context.is_valid_T, NO_TOKEN)
    return token_T.view(int(context.sequence_T[-1]) + 1, -1)


class NgramLayer(MoELayer):
    """A MoELayer that also adds what its tables know of the last tokens."""

    def __init__(self, config: MoEConfig, router: Router, tables: NgramTables) -> None:
        super().__init__(config, router)
        self.tables = tables

    def expect(self, context: RoutingContext) -> None:
        self.tables.expect_rows(self.tables.row_TN(context))

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, list[RouterStats]]:
        y_TD, carry, stats = super().forward(x_TD, carry, context)
        return y_TD + self.tables(x_TD, context), carry, stats

    def flops(self, loads: Sequence[Tensor], passes: float) -> LayerFlops:
        """The two projections count as shared; rows are read, not multiplied."""
        found = super().flops(loads, passes)
        projections = 2.0 * (self.tables.key.weight.numel() + self.tables.value.weight.numel())
        return replace(found, shared=found.shared + passes * projections)


def engram(
    config: MoEConfig,
    *,
    layers: Sequence[int] = (0,),
    rows: int = 65_521,
    width: int = 32,
    heads: int = 4,
    seed: int = 0,
) -> Body:
    """Any router, and tables in some of the MoE layers.

    Args:
        config: sizes and router.
        layers: MoE layers that have tables, 0..L-1.
        rows: of each length's and head's table; a prime spreads hashes best.
        width: of a row.
        heads: hash functions per length.
        seed: of the hash functions.

    Raises:
        ValueError: if a layer or a size is out of range.
    """
    expect_choices(config)
    sizes = config.router_sizes
    if not layers or not all(0 <= layer < sizes.num_layers for layer in layers):
        raise ValueError(f"layers must be MoE layers, 0..{sizes.num_layers - 1}; got {list(layers)}")
    if min(rows, width, heads) < 1:
        raise ValueError(f"rows, width and heads must be at least 1; got {rows}, {width} and {heads}")
    first = sizes.first_state_layer + sizes.num_layers
    tables = {
        layer: NgramTables(config, rows, width, heads, first + place, seed + layer)
        for place, layer in enumerate(sorted(set(layers)))
    }
    routers = build_routers(config.router, sizes, config.router_options)
    return Body(
        layers=[
            NgramLayer(config, router, tables[layer]) if layer in tables else MoELayer(config, router)
            for layer, router in enumerate(routers)
        ]
    )
