"""Product keys: a pair's score is its row's plus its column's, so 2 sqrt(N) scores are enough to find the K best of N.

Source: Lample et al. 2019, arXiv:1907.05242, section 3.1; He 2024 (PEER), arXiv:2407.04153, sections 2.1-2.2.

Shapes: T tokens, D model width, H heads, K experts per head, M = sqrt(N) rows and columns, A = width of a sub-key.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

from ...choice.table_rows import gather_dot
from ...contract.assignment import Routing
from ...contract.context import Carry, RoutingContext
from ...contract.module import at_least_float32
from ...contract.router import RouterSizes
from ...losses.marginals import MarginalStats
from ..constant_weights import warn_of_constant_weights
from ..options import expect_one_of
from .grid import GridLoss, GridRouter, Selection

QueryNorm = Literal["none", "layer", "batch"]
MOMENTUM, EPSILON = 0.1, 1e-5  # of the running statistics, as in torch's BatchNorm1d


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
            score_THK = self._scores(query, found) if torch.is_grad_enabled() else found.score_THK
            weight_THK = score_THK.softmax(dim=-1)
            stats = self.grid_stats(query, found, context)
        return self.experts(found, weight_THK.flatten(1), context), carry, stats

    def parts(self, query: Tensor) -> Tensor:
        """[2, 1, n, M]: the scores themselves."""
        return (query.flatten(0, 1).transpose(0, 1) @ self.keys.mT.to(query.dtype))[:, None]

    def paired_columns(self, k: int) -> list[int]:
        """A pair is beaten by all pairs of better rows and columns, so K of them leave it no place; K ln K stay."""
        return [k // (row + 1) for row in range(k)]

    def notes(self) -> list[Tensor]:
        return list(self._seen or ())

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
