"""UltraMemV2's router: Tucker-decomposed query-key retrieval (TDQKR) over a square grid of values.

A pair's score is bilinear in the row's and the column's scores of r ranks: s = S_row^T C S_col. Candidates come from
the best rank-1 approximation of C: rows by u . S_row, columns by v . S_col; among their pairs the full form decides.

Source: Huang et al. 2025 (UltraMemV2), arXiv:2508.18756, section 3; Huang et al. 2024 (UltraMem), arXiv:2411.12364,
section 3.2.

Shapes: T tokens, D model width, H heads, K values per head, r ranks, M = sqrt(N) rows and columns, A = width of a
sub-key, c cores.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm

from ...choice.table_rows import gather_dot
from ...contract.assignment import Routing
from ...contract.context import Carry, RoutingContext
from ...contract.module import at_least_float32
from ...contract.router import RouterSizes
from ...losses.marginals import MarginalStats
from .grid import GridLoss, GridRouter, Selection

EPSILON = 1e-6  # of the RMS norms of queries and keys


class TuckerKeyRouter(GridRouter):
    """Scores are raw: no softmax, and none of the published runs balances anything.

    The routing's weights are the sums over cores, which select; the carry's `core_weight` [T, H * K, c] holds each
    core's own.

    Args:
        sizes, layer, num_heads, key_width, grid_loss: as for `GridRouter`; `key_width` is that of rows and columns
            together.
        ranks: r, each with queries and keys of its own; at least 1.
        cores: c, at least 1; each weighs its own part of a value.

    Raises:
        ValueError: if there is no rank or no core.
    """

    CORE_WEIGHT = "core_weight"

    def __init__(
        self,
        sizes: RouterSizes,
        layer: int,
        num_heads: int = 1,
        key_width: int = 128,
        ranks: int = 2,
        cores: int = 2,
        grid_loss: GridLoss = "none",
    ) -> None:
        super().__init__(sizes, layer, num_heads, key_width, grid_loss)
        if ranks < 1 or cores < 1:
            raise ValueError(f"ranks and cores must be at least 1; got {ranks} and {cores}")
        self.ranks = ranks
        self.query = nn.Parameter(torch.empty(num_heads * 2 * ranks * self.half_width, sizes.width))
        self.query_gain = nn.Parameter(torch.empty(self.half_width))
        self.key_gain = nn.Parameter(torch.empty(self.half_width))
        self.keys = nn.Parameter(torch.empty(2, ranks, self.num_rows, self.half_width))
        self.core = nn.Parameter(torch.empty(cores, ranks, ranks))
        self.register_buffer("proxy_sign", torch.ones(2, ranks))

    def init_parameters(self, std: float) -> None:
        for parameter in (self.query, self.keys):
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        for gain in (self.query_gain, self.key_gain):
            nn.init.constant_(gain, self.half_width**-0.4)
        nn.init.uniform_(self.core)
        nn.init.ones_(self.proxy_sign)

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, MarginalStats]:
        k = self.top_k(context)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = at_least_float32(x_TD)
            query = linear(x_TD, self.query.to(x_TD.dtype)).unflatten(-1, (self.num_heads, 2, self.ranks, -1))
            query = rms_norm(query, (self.half_width,), self.query_gain.to(query.dtype), EPSILON)
            found = self.select(query, k, context.is_valid_T)
            core_score = self._core_scores(query, found)
            stats = self.grid_stats(query, found, context)
        routing = self.experts(found, core_score.sum(dim=-1), context)
        return routing, carry.put(**{self.CORE_WEIGHT: core_score}), stats

    @torch.no_grad()
    def proxy(self, dtype: torch.dtype) -> Tensor:
        """Leading singular vectors u and v, [2, r], of the summed cores, of the sign that continues the last step's.

        Both could as well be negated, which would select the lowest rows and columns instead of the highest.
        """
        left, _, right = torch.linalg.svd(self.core.double().sum(dim=0))
        u, v = left[:, 0], right[0]
        agrees = (u * self.proxy_sign[0]).sum() + (v * self.proxy_sign[1]).sum() >= 0
        sign = 1.0 if agrees else -1.0
        return (sign * torch.stack([u, v])).to(dtype)

    def pair_form(self, dtype: torch.dtype) -> Tensor:
        """The summed cores."""
        return self.core.sum(dim=0).to(dtype)

    def parts(self, query: Tensor) -> Tensor:
        """[2, r, n, M]: queries of each rank times its keys."""
        sides = query.flatten(0, 1).flatten(1, 2).transpose(0, 1)
        return (sides @ self._keys(query.dtype).flatten(0, 1).mT).unflatten(0, (2, self.ranks))

    @torch.no_grad()
    def post_step(self, count_R: Tensor, num_tokens: int) -> None:
        """Remember the signs of this step's proxy, for the next one to continue."""
        self.proxy_sign.copy_(self.proxy(torch.float32))

    def _keys(self, dtype: torch.dtype) -> Tensor:
        return rms_norm(self.keys.to(dtype), (self.half_width,), self.key_gain.to(dtype), EPSILON)

    def _core_scores(self, query: Tensor, found: Selection) -> Tensor:
        """[T, H * K, c], with gradient from the keys of the selected rows and columns only."""
        row, column = self._parts_anew(query, found) if torch.is_grad_enabled() else found.part
        # one product for all cores and slots: a bilinear form of two numbers per slot would be as many small products
        pair = torch.stack([(one * other).flatten() for one in row for other in column])
        score = self.core.to(query.dtype).flatten(1) @ pair
        return score.view(len(self.core), len(query), -1).permute(1, 2, 0)

    def _parts_anew(self, query: Tensor, found: Selection) -> list[list[Tensor]]:
        """The parts of the selected rows, and columns, with gradient."""
        keys = self._keys(query.dtype)
        return [
            [
                gather_dot(query[:, :, half, rank].flatten(0, 1), keys[half, rank], place.flatten(0, 1))
                for rank in range(self.ranks)
            ]
            for half, place in enumerate((found.row_THK, found.column_THK))
        ]
