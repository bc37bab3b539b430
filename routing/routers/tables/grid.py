"""Routers over a square grid of N = M * M experts: the K best places in time and memory of M.

Selection runs over a few tokens at a time and without gradient; the scores of what was selected are then computed anew,
with gradient, from the selected keys only. Nothing of size T times N, or T times M, is ever held.

Shapes: T tokens, D model width, H heads, K experts per head, M = sqrt(N) rows and columns, A = width of a sub-key, P
pairs of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...choice.table_rows import slices
from ...choice.top_k import top_experts
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
        probability_R: mean softmax over rows, then columns, halved.
        entropy: mean over tokens, heads, rows and columns.
    """

    row_THK: Tensor
    column_THK: Tensor
    score_THK: Tensor
    probability_R: Tensor
    entropy: Tensor


class GridRouter(RouterModule):
    """What routers over a square grid of experts share: sizes, chunked selection, statistics of rows and columns.

    A subclass says what the scores of rows and columns are (`first_stage`), which pairs of the best ones can be among
    the best places (`pairs`), and what a pair's score is (`second_stage`).

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

    def first_stage(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of some tokens: scores of rows and columns [t, H, M], and what the second stage needs, [t, H, ranks, M]."""
        raise NotImplementedError

    def pairs(self, k: int) -> list[tuple[int, int]]:
        """Ranks of the row and of the column, best first from 0, of each pair that the second stage scores."""
        return [(row, column) for row in range(k) for column in range(k)]

    def second_stage(self, row: Tensor, column: Tensor, first_P: Tensor, second_P: Tensor) -> Tensor:
        """Scores [t, H, P] of the pairs, from the first-stage parts [t, H, ranks, K] of the K best rows and columns.

        Args:
            row, column: those parts, best first.
            first_P, second_P: `pairs(K)`: ranks of rows, and of columns.
        """
        raise NotImplementedError

    @torch.no_grad()
    def select(self, query: Tensor, k: int, is_valid_T: Tensor | None) -> Selection:
        """The K best pairs of every token and head, a few tokens at a time."""
        best, sums = [], []
        rank_2P = torch.tensor(self.pairs(k), device=query.device).T
        for part in slices(len(query), self.num_heads * max(2 * self.num_rows * (1 + self.ranks), k * k)):
            row_score, column_score, *parts = self.first_stage(query[part])
            places = [_best_places(score, k) for score in (row_score, column_score)]
            best.append(self._best_pairs(parts, places, rank_2P, k))
            valid = slice(None) if is_valid_T is None else is_valid_T[part]
            sides = zip((row_score, column_score), places, strict=True)
            sums.append([_total_and_entropy(score[valid], place[valid][..., :1]) for score, place in sides])
        rows, columns, scores = (torch.cat(found) for found in zip(*best, strict=True))
        num_valid = len(query) if is_valid_T is None else int(is_valid_T.sum())
        share = 1 / max(num_valid * self.num_heads * 2, 1)
        return Selection(
            row_THK=rows,
            column_THK=columns,
            score_THK=scores,
            probability_R=torch.stack([torch.cat([total for total, _ in both]) for both in sums]).sum(dim=0) * share,
            entropy=torch.stack([entropy for both in sums for _, entropy in both]).sum() * share,
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

    def _best_pairs(
        self, parts: Sequence[Tensor], places: Sequence[Tensor], rank_2P: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and scores of the K best pairs, from the best rows and columns of some tokens."""
        picked = (_pick(part, place) for part, place in zip(parts, places, strict=True))
        score = self.second_stage(*picked, *rank_2P)
        pair = _best_places(score, k)
        row, column = (place.gather(-1, ranks[pair]) for place, ranks in zip(places, rank_2P, strict=True))
        return row, column, score.gather(-1, pair)

    def _mean_probability(self, query: Tensor) -> Tensor:
        """With gradient; each run of tokens is computed again in the backward pass instead of being kept."""

        def total(part: Tensor) -> Tensor:
            row_score, column_score, _, _ = self.first_stage(part)
            return torch.cat([row_score.softmax(dim=-1), column_score.softmax(dim=-1)], dim=-1).sum(dim=(0, 1))

        parts = slices(len(query), self.num_heads * 2 * self.num_rows * (1 + self.ranks))
        sums = [checkpoint(total, query[part], use_reentrant=False) for part in parts]
        return torch.stack(sums).sum(dim=0) / max(len(query) * self.num_heads * 2, 1)


def _best_places(score: Tensor, k: int) -> Tensor:
    """The places [t, H, K] of the K highest of scores [t, H, M], best first."""
    return top_experts(score.flatten(0, 1), k).unflatten(0, score.shape[:2])


def _total_and_entropy(score: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Of scores [t, H, M]: the summed distributions [M], and their summed entropies, with one exponential per score.

    Args:
        score: of rows or columns.
        best: the place [t, H, 1] of each highest score.
    """
    share = score.softmax(dim=-1)
    logsumexp = score.gather(-1, best) - share.gather(-1, best).log()
    return share.sum(dim=(0, 1)), logsumexp.sum() - torch.dot(share.flatten(), score.flatten())


def _pick(part: Tensor, place: Tensor) -> Tensor:
    """The entries [t, H, ranks, K] of [t, H, ranks, M] at places [t, H, K]."""
    return part.gather(-1, place[:, :, None].expand(-1, -1, part.shape[2], -1))
