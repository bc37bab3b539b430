"""Pooled experts: all tokens of a document choose from one pool, its experts with the largest summed probability.

Shapes: T tokens, B sequences (documents), S positions, R = E + Z routable experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...choice.top_k import top_experts
from ...contract.context import Carry, RoutingContext
from ...contract.router import RouterSizes
from ..classic.classic import ClassicRouter, Scores
from ..classic.rule import RULE_PARTS, ClassicRule
from ..options import Options, expect_at_least
from .sequences import Sequences, SequenceState

PUBLISHED_SHARE = 16
"""The smallest published pool is 8 of 128 experts."""


@dataclass(frozen=True, kw_only=True)
class PoolOptions(Options):
    """Options of pooled routing besides those of the rule.

    Args:
        smallest: experts of the smallest pool in training; E / 16, and at least K, if not given.
        largest: experts of the largest; all if not given.
        pool: experts of the pool outside training, chosen by the text so far; all if not given.
    """

    smallest: int | None = None
    largest: int | None = None
    pool: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("smallest", "largest", "pool"):
            if getattr(self, name) is not None:
                expect_at_least(name, getattr(self, name), 1)


class PoolRouter(ClassicRouter):
    """In training a document's tokens choose from a pool whose size is drawn anew each time; else from all experts.

    A row of the batch counts as one document. The training pool looks at the whole document. Outside training `pool`
    limits a token to the experts with the largest summed probability up to that token, so that it can generate.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves.
        rule: how logits become a routing.
        options: sizes of the pools.

    Raises:
        ValueError: if a pool holds fewer than K or more than E + Z experts, or the smallest exceeds the largest.

    Source: AI2 2026 (EMO), arXiv:2605.06663, for training; the pool of the text so far is ours.
    """

    option_groups: ClassVar[tuple[type, ...]] = (*RULE_PARTS, PoolOptions)

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule, options: PoolOptions) -> None:
        super().__init__(sizes, layer, rule)
        R, K = sizes.num_routable, sizes.top_k
        self.smallest = min(R, max(K, -(-R // PUBLISHED_SHARE))) if options.smallest is None else options.smallest
        self.largest = R if options.largest is None else options.largest
        self.pool = options.pool
        pools = [size for size in (self.smallest, self.largest, self.pool) if size is not None]
        if self.smallest > self.largest or min(pools) < K or max(pools) > R:
            raise ValueError(
                f"pools must hold {K} (K) to {R} (E + Z) experts, the smallest first; "
                f"got {self.smallest} to {self.largest}, and {self.pool} outside training"
            )

    @property
    def most_choices(self) -> int:
        return min(self.smallest, self.pool or self.sizes.num_routable)

    def choosable(self, scores: Scores, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry]:
        score_TR = scores.score_TR.detach()
        if not context.is_training and self.pool is None:
            return score_TR, carry
        sequences = Sequences.of(context, len(score_TR), score_TR.device)
        share_BSR = sequences.grid(scores.probability_TR.detach()) * sequences.is_valid_BS[..., None]
        pool_BSR = self._drawn(share_BSR) if context.is_training else self._so_far(share_BSR, context)
        is_in_pool_TR = sequences.flat(pool_BSR.expand_as(share_BSR))
        return score_TR.masked_fill(~is_in_pool_TR, -torch.inf), carry

    def _drawn(self, share_BSR: Tensor) -> Tensor:
        """bool [B, 1, R]: each document's best experts, as many as were drawn for it."""
        total_BR = share_BSR.sum(dim=1)
        rank_BR = top_experts(total_BR, total_BR.shape[1]).argsort(dim=1)
        size_B1 = torch.randint(self.smallest, self.largest + 1, (len(total_BR), 1), device=total_BR.device)
        return (rank_BR < size_B1)[:, None]

    def _so_far(self, share_BSR: Tensor, context: RoutingContext) -> Tensor:
        """bool [B, S, R]: the best experts of each token's sequence up to the token."""
        state = SequenceState(context.cache, self.sizes.first_state_layer + self.layer)
        before_BR = state.latest()
        # in float64 the sums of one call are those of many, one token each
        parts = [share_BSR.double()] if before_BR is None else [before_BR[:, None], share_BSR.double()]
        total_BSR = torch.cat(parts, dim=1).cumsum(dim=1)[:, -share_BSR.shape[1] :]
        state.append(total_BSR)
        best = top_experts(total_BSR.flatten(0, 1), self.pool or 0)
        in_pool = torch.zeros_like(total_BSR.flatten(0, 1), dtype=torch.bool).scatter(1, best, True)
        return in_pool.view_as(total_BSR)
