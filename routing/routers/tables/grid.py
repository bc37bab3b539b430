"""Routers over a square grid of N = M * M experts: the K best places in time and memory of M.

Selection runs over a few tokens at a time and without gradient; the scores of what was selected are then computed anew,
with gradient, from the selected keys only. Nothing of size T times N, or T times M, is ever held.

Shapes: T tokens, D model width, H heads, K experts per head, M = sqrt(N) rows and columns, A = width of a sub-key.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...choice.grid_best import best_of_grid, side_scores
from ...choice.table_rows import slices
from ...contract.assignment import Routing
from ...contract.context import RoutingContext
from ...contract.module import RouterModule, drop_padding
from ...contract.router import RouterSizes
from ...losses.marginals import MarginalStats
from ..options import expect_one_of

GridLoss = Literal["none", "switch"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """The result of a selection over all tokens, without gradient.

    Args:
        row_THK, column_THK: int64 places of the chosen experts in the grid.
        score_THK: their scores, without gradient.
        part: what these are made of, [2, ranks, T * H, K].
        probability_R: mean softmax over rows, then columns, halved.
        entropy: mean over tokens, heads, rows and columns.
    """

    row_THK: Tensor
    column_THK: Tensor
    score_THK: Tensor
    part: Tensor
    probability_R: Tensor
    entropy: Tensor


class GridRouter(RouterModule):
    """What routers over a square grid of experts share: sizes, chunked selection, statistics of rows and columns.

    A subclass says what the scores of rows and columns are made of (`parts`, `proxy`), which pairs of the best ones can
    be among the best places (`paired_columns`), and what a pair's score is (`pair_form`).

    Args:
        sizes: D, N as the number of experts, K per head.
        layer: which memory layer this router serves.
        num_heads: H, at least 1; each picks K experts of its own.
        key_width: width of a query or key, both halves together; even.
        grid_loss: `switch` balances rows and columns by the Switch loss; as published there is `none`.

    Raises:
        ValueError: if N is not a square, K exceeds its root, or there are zero-compute experts.
    """

    ranks = 1

    def __init__(self, sizes: RouterSizes, layer: int, num_heads: int, key_width: int, grid_loss: GridLoss) -> None:
        super().__init__(sizes, layer)
        expect_one_of("grid_loss", grid_loss, get_args(GridLoss))
        self.num_rows = isqrt(sizes.num_experts)
        if self.num_rows**2 != sizes.num_experts:
            raise ValueError(
                f"product keys need a square number of experts; got {sizes.num_experts}, "
                f"take {self.num_rows**2} or {(self.num_rows + 1) ** 2}"
            )
        if sizes.top_k > self.num_rows:
            raise ValueError(f"K must be at most {self.num_rows}, the root of the number of experts; got {sizes.top_k}")
        if sizes.zero_compute:
            raise ValueError(f"product keys have no zero-compute experts; got {', '.join(sizes.zero_compute)}")
        if num_heads < 1 or key_width < 2 or key_width % 2:
            raise ValueError(
                f"num_heads must be at least 1 and key_width even and positive; got {num_heads}, {key_width}"
            )
        self.num_heads, self.half_width = num_heads, key_width // 2
        self.balance_loss = grid_loss

    @property
    def key_flops(self) -> float:
        """Operations of a token beyond the router's matrices: all sub-keys, and the pairs of the candidates."""
        keys = 2 * 2 * self.num_rows * self.half_width * self.ranks
        pairs = 2 * self.sizes.top_k * self.ranks * (self.ranks + self.sizes.top_k)
        return float(self.num_heads * (keys + pairs))

    def flops(self) -> float:
        """Queries, sub-keys and pairs."""
        return super().flops() + self.key_flops

    def top_k(self, context: RoutingContext) -> int:
        """K per head of this call."""
        self.expect_no_logit_bias(context)
        return super().top_k(context)

    @property
    def most_choices(self) -> int:
        """Per head: the root of N, as many as there are rows."""
        return self.num_rows

    def parts(self, query: Tensor) -> Tensor:
        """What scores are made of: of rows, then of columns, [2, ranks, n, M] of the n = t H queries of t tokens."""
        raise NotImplementedError

    def proxy(self, dtype: torch.dtype) -> Tensor | None:
        """Weights [2, ranks] of the parts in the scores by which rows and columns are chosen; None of a single part."""
        return None

    def pair_form(self, dtype: torch.dtype) -> Tensor | None:
        """The bilinear form [ranks, ranks] of the parts of a row and a column; None if a pair's score is their sum."""
        return None

    def paired_columns(self, k: int) -> list[int]:
        """With how many of the K best columns each of the K best rows is paired, the best row first."""
        return [k] * k

    @torch.no_grad()
    def select(self, query: Tensor, k: int, is_valid_T: Tensor | None) -> Selection:
        """The K best pairs of every token and head, a few tokens at a time."""
        best, heads = [], (len(query), self.num_heads)
        columns = self.paired_columns(k)
        proxy, form = self.proxy(query.dtype), self.pair_form(query.dtype)
        for part in slices(len(query), self.num_heads * max(2 * self.num_rows * (1 + self.ranks), k * k)):
            is_valid_n = None if is_valid_T is None else is_valid_T[part].repeat_interleave(self.num_heads)
            best.append(best_of_grid(self.parts(query[part]), proxy, form, columns, is_valid_n))
        num_valid = len(query) if is_valid_T is None else int(is_valid_T.sum())
        share = 1 / max(num_valid * self.num_heads * 2, 1)
        return Selection(
            row_THK=_joined([each.row_nK for each in best]).unflatten(0, heads),
            column_THK=_joined([each.column_nK for each in best]).unflatten(0, heads),
            score_THK=_joined([each.score_nK for each in best]).unflatten(0, heads),
            part=_joined([each.part_2rnK for each in best], dim=2),
            probability_R=torch.stack([each.probability_2M for each in best]).sum(dim=0).flatten() * share,
            entropy=torch.stack([each.entropy for each in best]).sum() * share,
        )

    def grid_stats(self, query: Tensor, found: Selection, context: RoutingContext) -> MarginalStats:
        """Statistics of rows and columns over valid tokens, with gradient only if a balance loss needs it."""
        row, column, valid = found.row_THK, found.column_THK, context.is_valid_T
        if valid is not None:
            query, row, column = query[valid], row[valid], column[valid]
        counts = [torch.bincount(place.flatten(), minlength=self.num_rows) for place in (row, column)]
        probability_R = found.probability_R
        if self.balance_loss != "none" and context.is_training and torch.is_grad_enabled():
            probability_R = self._mean_probability(query)
        return MarginalStats(
            num_tokens=len(row),
            experts_per_token=row.shape[1] * row.shape[2],
            probability_R=probability_R,
            count_R=torch.cat(counts),
            entropy=found.entropy,
            balance_loss=self.balance_loss,
        )

    def experts(self, found: Selection, weight_TK: Tensor, context: RoutingContext) -> Routing:
        """The routing of a selection, heads side by side; an expert that two heads chose stands there twice."""
        expert_TK = (found.row_THK * self.num_rows + found.column_THK).flatten(1)
        return drop_padding(self.routing(expert_TK, weight_TK), context)

    def _mean_probability(self, query: Tensor) -> Tensor:
        """With gradient; each run of tokens is computed again in the backward pass instead of being kept."""

        def total(part: Tensor) -> Tensor:
            return side_scores(self.parts(part), self.proxy(part.dtype)).softmax(dim=-1).sum(dim=1).flatten()

        parts = slices(len(query), self.num_heads * 2 * self.num_rows * (1 + self.ranks))
        sums = [checkpoint(total, query[part], use_reentrant=False) for part in parts]
        return torch.stack(sums).sum(dim=0) / max(len(query) * self.num_heads * 2, 1)


def _joined(runs: Sequence[Tensor], dim: int = 0) -> Tensor:
    """What several runs of tokens gave; that of a single run as it is."""
    return runs[0] if len(runs) == 1 else torch.cat(list(runs), dim=dim)
