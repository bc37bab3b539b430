"""Product keys: the K best of N = M * M experts in time and memory of M, as a score is a row's plus a column's.

Selection runs over a few tokens at a time and without gradient; the scores of what was selected are then computed anew,
with gradient, from the selected keys only. Nothing of size T times N, or T times M, is ever held.

Source: Lample et al. 2019, arXiv:1907.05242, section 3.1; He 2024 (PEER), arXiv:2407.04153, sections 2.1-2.2.

Shapes: T tokens, D model width, H heads, K experts per head, M = sqrt(N) rows and columns, A = width of a sub-key.
"""

from dataclasses import dataclass
from math import isqrt
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear
from torch.utils.checkpoint import checkpoint

from ...choice.table_rows import gather_dot, slices
from ...contract.assignment import Routing
from ...contract.context import Carry, RoutingContext
from ...contract.module import RouterModule, at_least_float32, drop_padding
from ...contract.router import RouterSizes
from ...losses.marginals import MarginalStats
from ..constant_weights import warn_of_constant_weights
from ..options import expect_one_of

QueryNorm = Literal["none", "layer", "batch"]
GridLoss = Literal["none", "switch"]
MOMENTUM, EPSILON = 0.1, 1e-5  # of the running statistics, as in torch's BatchNorm1d


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """The result of a selection over all tokens, without gradient.

    Args:
        row_THK, column_THK: int64 places of the chosen experts in the grid.
        probability_R: mean softmax over rows, then columns, halved.
        entropy: mean over tokens, heads, rows and columns.
    """

    row_THK: Tensor
    column_THK: Tensor
    probability_R: Tensor
    entropy: Tensor


class GridRouter(RouterModule):
    """What routers over a square grid of experts share: sizes, chunked selection, statistics of rows and columns.

    A subclass says what the scores of rows and columns are (`first_stage`) and how they make the score of a pair
    (`second_stage`).

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

    def second_stage(self, row: Tensor, column: Tensor) -> Tensor:
        """Scores [t, H, K, K] of the pairs of K rows and K columns, from their first-stage parts [t, H, ranks, K]."""
        raise NotImplementedError

    @torch.no_grad()
    def select(self, query: Tensor, k: int, is_valid_T: Tensor | None) -> Selection:
        """The K best pairs of every token and head, a few tokens at a time."""
        rows, columns, total, entropy = [], [], 0.0, 0.0
        for part in slices(len(query), self.num_heads * max(2 * self.num_rows * (1 + self.ranks), k * k)):
            row_score, column_score, row, column = self._select_some(query[part], k)
            rows.append(row)
            columns.append(column)
            valid = slice(None) if is_valid_T is None else is_valid_T[part]
            sums = [_total_and_entropy(score[valid]) for score in (row_score, column_score)]
            total = total + torch.cat([share for share, _ in sums])
            entropy = entropy + sums[0][1] + sums[1][1]
        num_valid = len(query) if is_valid_T is None else int(is_valid_T.sum())
        share = 1 / max(num_valid * self.num_heads * 2, 1)
        return Selection(
            row_THK=torch.cat(rows), column_THK=torch.cat(columns), probability_R=total * share, entropy=entropy * share
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

    def _select_some(self, query: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row_score, column_score, row_part, column_part = self.first_stage(query)
        row, column = (score.topk(k, dim=-1).indices for score in (row_score, column_score))
        grid = self.second_stage(_pick(row_part, row), _pick(column_part, column))
        place = grid.flatten(-2).topk(k, dim=-1).indices
        return row_score, column_score, row.gather(-1, place // k), column.gather(-1, place % k)

    def _mean_probability(self, query: Tensor) -> Tensor:
        """With gradient; each run of tokens is computed again in the backward pass instead of being kept."""

        def total(part: Tensor) -> Tensor:
            row_score, column_score, _, _ = self.first_stage(part)
            return torch.cat([row_score.softmax(dim=-1), column_score.softmax(dim=-1)], dim=-1).sum(dim=(0, 1))

        parts = slices(len(query), self.num_heads * 2 * self.num_rows * (1 + self.ranks))
        sums = [checkpoint(total, query[part], use_reentrant=False) for part in parts]
        return torch.stack(sums).sum(dim=0) / max(len(query) * self.num_heads * 2, 1)


def _total_and_entropy(score: Tensor) -> tuple[Tensor, Tensor]:
    """Of scores [t, H, M]: the summed distributions [M], and their summed entropies, with one exponential per score."""
    share = score.softmax(dim=-1)
    logsumexp = score.amax(dim=-1) - share.amax(dim=-1).log()
    return share.sum(dim=(0, 1)), (logsumexp - torch.linalg.vecdot(share, score)).sum()


def _pick(part: Tensor, place: Tensor) -> Tensor:
    """The entries [t, H, ranks, K] of [t, H, ranks, M] at places [t, H, K]."""
    return part.gather(-1, place[:, :, None].expand(-1, -1, part.shape[2], -1))


class ProductKeyRouter(GridRouter):
    """PEER's router: per head a query of two halves, sub-keys that all heads share, softmax over the K selected.

    Args:
        sizes, layer, num_heads, key_width, grid_loss: as for `GridRouter`.
        query_norm: of each head's query: `batch` as in the paper (running statistics outside training), `layer` or
            `none`.
    """

    def __init__(
        self,
        sizes: RouterSizes,
        layer: int,
        num_heads: int = 8,
        key_width: int = 128,
        query_norm: QueryNorm = "batch",
        grid_loss: GridLoss = "none",
    ) -> None:
        super().__init__(sizes, layer, num_heads, key_width, grid_loss)
        expect_one_of("query_norm", query_norm, get_args(QueryNorm))
        if sizes.top_k == 1:
            warn_of_constant_weights(type(self).__name__)
        self.query_norm = query_norm
        width = num_heads * key_width
        self.query = nn.Parameter(torch.empty(width, sizes.width))
        self.keys = nn.Parameter(torch.empty(2, self.num_rows, self.half_width))
        is_batch = query_norm == "batch"
        self.query_mean: Tensor | None
        self.query_variance: Tensor | None
        self.register_buffer("query_mean", torch.zeros(width) if is_batch else None)
        self.register_buffer("query_variance", torch.ones(width) if is_batch else None)
        self._seen: tuple[Tensor, Tensor] | None = None

    def init_parameters(self, std: float) -> None:
        for parameter in (self.query, self.keys):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        if self.query_mean is not None:
            nn.init.zeros_(self.query_mean)
            nn.init.ones_(self.query_variance)

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, MarginalStats]:
        k = self.top_k(context)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = at_least_float32(x_TD)
            query = self._normed(linear(x_TD, self.query.to(x_TD.dtype)), context)
            query = query.unflatten(-1, (self.num_heads, 2, self.half_width))
            found = self.select(query, k, context.is_valid_T)
            weight_THK = self._scores(query, found).softmax(dim=-1)
            stats = self.grid_stats(query, found, context)
        return self.experts(found, weight_THK.flatten(1), context), carry, stats

    def first_stage(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        row, column = (query[:, :, half] @ self.keys[half].T.to(query.dtype) for half in (0, 1))
        return row, column, row[:, :, None], column[:, :, None]

    def second_stage(self, row: Tensor, column: Tensor) -> Tensor:
        return row[:, :, 0, :, None] + column[:, :, 0, None, :]

    @torch.no_grad()
    def post_step(self, count_R: Tensor, num_tokens: int) -> None:
        """Move the running statistics of queries towards those of the step's last micro-batch."""
        if self.query_mean is not None and self._seen is not None:
            for buffer, seen in zip((self.query_mean, self.query_variance), self._seen, strict=True):
                buffer.lerp_(seen.to(buffer), MOMENTUM)

    def _scores(self, query: Tensor, found: Selection) -> Tensor:
        """[T, H, K] with gradient, from the keys of the selected rows and columns only."""
        score = 0.0
        for half, place in enumerate((found.row_THK, found.column_THK)):
            keys = self.keys[half].to(query.dtype)
            score = score + gather_dot(query[:, :, half].flatten(0, 1), keys, place.flatten(0, 1))
        return score.view(found.row_THK.shape)

    def _normed(self, query_TQ: Tensor, context: RoutingContext) -> Tensor:
        if self.query_norm == "none":
            return query_TQ
        if self.query_norm == "layer":
            return layer_norm(query_TQ.unflatten(-1, (self.num_heads, -1)), (2 * self.half_width,)).flatten(-2)
        mean, variance = self.query_mean, self.query_variance
        if context.is_training:
            valid = query_TQ if context.is_valid_T is None else query_TQ[context.is_valid_T]
            mean, variance = valid.mean(dim=0), valid.var(dim=0, correction=0)
            self._seen = (mean.detach(), variance.detach())
        return (query_TQ - mean.to(query_TQ.dtype)) * (variance.to(query_TQ.dtype) + EPSILON).rsqrt()
