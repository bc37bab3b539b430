"""Routing by a pooled score: one decision for a chunk of tokens or a whole sequence.

Scores are linear, so the score of a mean token is the mean of the tokens' scores, and only scores are kept while
decoding. They form one more layer of the key/value cache, so beam search and cropping treat them as they treat keys.

Source: Hydra (2025), arXiv:2508.15099, whose abstract says: one decision per chunk. How a chunk is pooled without
looking ahead is ours.

Shapes: B sequences, S positions of this call, T = B * S tokens, P positions so far, D model width, R routable experts.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...contract.context import Carry, RoutingContext
from ...contract.router import RouterSizes
from ..options import expect_one_of
from .classic import ClassicRouter
from .rule import ClassicRule

Pooling = Literal["previous_chunk", "prefix", "chunk", "sequence"]
FirstChunk = Literal["prefix", "zero"]
CAUSAL = ("previous_chunk", "prefix")


class PooledRouter(ClassicRouter):
    """Every token is routed by a mean score over tokens of its sequence.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves.
        rule: how logits become a routing.
        pooling: over which tokens the mean runs: those of the `previous_chunk` (one decision per chunk), the `prefix`
            up to the token itself (a decision per token), or, without causality, the token's own `chunk` or the whole
            `sequence`.
        chunk: tokens in a chunk.
        first_chunk: what routes the first chunk under `previous_chunk`, which has none before it: the mean of the
            `prefix` up to each token, or `zero`, where all scores tie and the first experts by number are taken.
        first_cache_layer: the cache layer of MoE layer 0's scores; the others follow.

    Raises:
        ValueError: if the pooling is unknown or the chunk is empty.
    """

    def __init__(
        self,
        sizes: RouterSizes,
        layer: int,
        rule: ClassicRule,
        pooling: Pooling = "previous_chunk",
        chunk: int = 16,
        first_chunk: FirstChunk = "prefix",
        first_cache_layer: int = 0,
    ) -> None:
        super().__init__(sizes, layer, rule)
        expect_one_of("pooling", pooling, get_args(Pooling))
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1 token; got {chunk}")
        expect_one_of("first_chunk", first_chunk, get_args(FirstChunk))
        self.pooling, self.chunk, self.first_chunk = pooling, chunk, first_chunk
        self.cache_layer = first_cache_layer + layer
        self.is_causal = pooling in CAUSAL

    def logits(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry]:
        logit_TR, carry = super().logits(x_TD, carry, context)
        if context.position_T is None or context.sequence_T is None:
            raise ValueError("pooled routing needs positions and sequences in the context; got none")
        B = int(context.sequence_T[-1]) + 1
        logit_BSR, position_BS = logit_TR.unflatten(0, (B, -1)), context.position_T.view(B, -1)
        valid_T = context.is_valid_T
        valid_BS = torch.ones_like(position_BS) if valid_T is None else valid_T.view(B, -1).to(position_BS)
        seen_BPR, place_BP2 = self._with_earlier(logit_BSR, torch.stack([position_BS, valid_BS], dim=-1), context)
        return self._pool(seen_BPR, place_BP2[..., 0], place_BP2[..., 1], position_BS).flatten(0, 1), carry

    def _with_earlier(self, logit_BSR: Tensor, place_BS2: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor]:
        """This call's scores and places after those of earlier calls."""
        cache = context.cache
        if cache is None:
            return logit_BSR, place_BS2
        if not isinstance(cache, DynamicCache):
            raise ValueError(f"pooled routing keeps scores in a DynamicCache; got {type(cache).__name__}")
        while len(cache.layers) <= self.cache_layer:
            cache.layers.append(DynamicLayer())
        # places are small whole numbers, exact in the float type that a cache layer keeps
        kept = cache.update(logit_BSR[:, None], place_BS2[:, None].to(logit_BSR.dtype), self.cache_layer)
        return kept[0][:, 0], kept[1][:, 0].round().long()

    def _pool(self, seen_BPR: Tensor, at_BP: Tensor, valid_BP: Tensor, position_BS: Tensor) -> Tensor:
        """[B, S, R]: the mean score that each token of this call is routed by."""
        weighed_BPR, S = seen_BPR * valid_BP[..., None], position_BS.shape[1]
        if self.pooling == "prefix":
            return _prefix_mean(weighed_BPR, valid_BP)[:, -S:]
        if self.pooling == "sequence":
            mean_B1R = weighed_BPR.sum(dim=1, keepdim=True) / valid_BP.sum(dim=1)[:, None, None].clamp_min(1)
            return mean_B1R.expand(-1, S, -1)
        mean_BSR = self._chunk_mean(weighed_BPR, at_BP, valid_BP, position_BS)
        if self.pooling == "chunk" or self.first_chunk == "zero":
            return mean_BSR
        is_first_BS1 = (position_BS < self.chunk)[..., None]
        return torch.where(is_first_BS1, _prefix_mean(weighed_BPR, valid_BP)[:, -S:], mean_BSR)

    def _chunk_mean(self, weighed_BPR: Tensor, at_BP: Tensor, valid_BP: Tensor, position_BS: Tensor) -> Tensor:
        """[B, S, R]: of each token's own chunk, or of the one before, which is 0 where there is none."""
        chunk_BP, wanted_BS = at_BP // self.chunk, position_BS // self.chunk
        num_chunks = int(torch.maximum(chunk_BP.max(), wanted_BS.max())) + 2
        # chunk i is written to place i + 1, so that the first chunk finds an empty place before it
        total = weighed_BPR.new_zeros(len(at_BP), num_chunks, weighed_BPR.shape[-1])
        total = total.scatter_add(1, (chunk_BP + 1)[..., None].expand_as(weighed_BPR), weighed_BPR)
        count = valid_BP.new_zeros(len(at_BP), num_chunks).scatter_add(1, chunk_BP + 1, valid_BP)
        mean = total / count[..., None].clamp_min(1)
        place_BS = wanted_BS + (self.pooling == "chunk")
        return mean.gather(1, place_BS[..., None].expand(-1, -1, mean.shape[-1]))


def _prefix_mean(weighed_BPR: Tensor, valid_BP: Tensor) -> Tensor:
    """[B, P, R]: the mean score of the valid tokens up to each position."""
    return weighed_BPR.cumsum(dim=1) / valid_BP.cumsum(dim=1)[..., None].clamp_min(1)
