"""Expert Threshold: an expert takes every token whose score exceeds the expert's own threshold, so choice is causal.

Shapes: T tokens, R routable experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...contract.assignment import Routing
from ...contract.context import Carry, RoutingContext
from ...contract.module import RouterModule, at_least_float32, drop_padding
from ...contract.router import RouterSizes
from ...contract.stats import RouterStats
from ..options import Options

START = 0.5
"""Of every threshold before the first step: the sigmoid of a logit of 0."""


@dataclass(frozen=True, kw_only=True)
class ThresholdOptions(Options):
    """The option of Expert Threshold.

    Args:
        kept_share: what a threshold keeps of itself per step, 0 <= share < 1; the first steps average instead.
    """

    kept_share: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.kept_share < 1:
            raise ValueError(f"kept_share must lie in 0..1; got {self.kept_share}")


class ThresholdRouter(RouterModule):
    """K is what a token visits on average: thresholds follow the quantile `1 - K / R` of each expert's scores.

    Scores are sigmoids and weigh as they are. Training and inference choose alike; no loss balances.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves.
        options: how slowly thresholds move.

    Source: Expert Threshold routing 2026, arXiv:2603.11535.
    """

    has_fixed_top_k = True
    option_groups: ClassVar[tuple[type, ...]] = (ThresholdOptions,)

    def __init__(self, sizes: RouterSizes, layer: int, options: ThresholdOptions) -> None:
        super().__init__(sizes, layer)
        self.kept_share = options.kept_share
        self.weight = nn.Parameter(torch.empty(sizes.num_routable, sizes.width))
        self.register_buffer("threshold_R", torch.full((sizes.num_routable,), START))
        self.register_buffer("num_steps", torch.zeros(1))
        self._latest: Tensor | None = None

    def init_parameters(self, std: float) -> None:
        super().init_parameters(std)
        nn.init.constant_(self.threshold_R, START)
        nn.init.zeros_(self.num_steps)

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        self.top_k(context)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = at_least_float32(x_TD)
            logit_TR = self.biased(linear(x_TD, self.weight.to(x_TD.dtype)), context)
            score_TR = logit_TR.sigmoid()
            routing = Routing.from_dense(
                score_TR, score_TR.detach() > self.threshold_R.to(score_TR), num_experts=self.sizes.num_experts
            )
            routing = drop_padding(routing, context)
            if context.is_training:
                self._note(score_TR.detach(), context)
            probability_TR = logit_TR.softmax(dim=-1)
        stats = self.stats(routing, routing, context, probability_TR=probability_TR, logit_TR=logit_TR)
        return routing, carry, stats

    def notes(self) -> list[Tensor]:
        return [] if self._latest is None else [self._latest]

    @torch.no_grad()
    def post_step(self, count_R: Tensor, num_tokens: int) -> None:
        """Move the thresholds towards the quantiles of the step's last micro-batch."""
        if self._latest is None:
            return
        self.num_steps += 1
        share = torch.maximum(1 / self.num_steps, torch.full_like(self.num_steps, 1 - self.kept_share))
        self.threshold_R += share * (self._latest.to(self.threshold_R) - self.threshold_R)

    def _note(self, score_TR: Tensor, context: RoutingContext) -> None:
        valid_TR = score_TR if context.is_valid_T is None else score_TR[context.is_valid_T]
        if len(valid_TR):
            share = 1 - self.sizes.top_k / self.sizes.num_routable
            self._latest = valid_TR.quantile(share, dim=0)
