"""Routers that draw random numbers in training: GShard's second expert, sigma-MoE's expert dropout.

Shapes: T tokens, K experts per token, R routable experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...contract.assignment import Routing
from ...contract.context import RoutingContext
from ...contract.router import RouterSizes
from ..options import Options
from .classic import ClassicRouter, Scores
from .rule import RULE_PARTS, ClassicRule


class GShardRouter(ClassicRouter):
    """Top-2 where training keeps the second expert with probability `min(1, 2 * its weight)`.

    Source: Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1.

    Raises:
        ValueError: if K is not 2.
    """

    has_fixed_top_k = True

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule) -> None:
        if sizes.top_k != 2:
            raise ValueError(f"gshard routes to exactly 2 experts; got top_k = {sizes.top_k}")
        super().__init__(sizes, layer, rule)

    def thin(self, chosen: Routing) -> Routing:
        second_T = chosen.weight_TK[:, 1].detach()
        is_lost_TK = torch.zeros_like(chosen.expert_TK, dtype=torch.bool)
        is_lost_TK[:, 1] = torch.rand_like(second_T) >= 2 * second_T
        return chosen.drop(is_lost_TK)


@dataclass(frozen=True, kw_only=True)
class SigmaOptions(Options):
    """The option of sigma-MoE besides those of the rule.

    Args:
        expert_dropout: share of the experts that a token cannot choose in a training step, 0 <= share < 1.
    """

    expert_dropout: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.expert_dropout < 1:
            raise ValueError(f"expert_dropout must lie in 0..1; got {self.expert_dropout}")


class SigmaRouter(ClassicRouter):
    """Independent sigmoid scores; training hides a random share of the experts from each token.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves.
        rule: how logits become a routing.
        options: share of the experts that training hides.

    Source: Csordas et al. 2023 (sigma-MoE), arXiv:2310.10837, section 5.
    """

    option_groups: ClassVar[tuple[type, ...]] = (*RULE_PARTS, SigmaOptions)

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule, options: SigmaOptions) -> None:
        super().__init__(sizes, layer, rule)
        self.expert_dropout = options.expert_dropout

    def init_parameters(self, std: float) -> None:
        """Rows of equal norm, as large as their standard deviation `sqrt(2 / (L D))` asks for."""
        super().init_parameters(std)
        if self.rule.initial.init == "normal" and self.rule.initial.init_scale is None:
            std = (2 / self.sizes.num_layers / self.sizes.width) ** 0.5
            nn.init.normal_(self.weight, std=std)
            if not getattr(self.weight, "_is_hf_initialized", False):
                with torch.no_grad():
                    self.weight.div_(self.weight.norm(dim=1, keepdim=True)).mul_(std * self.sizes.width**0.5)

    def select(self, logit_TR: Tensor, score_TR: Tensor, context: RoutingContext) -> Tensor:
        if not (context.is_training and self.expert_dropout):
            return super().select(logit_TR, score_TR, context)
        is_hidden_TR = torch.rand_like(score_TR) < self.expert_dropout
        expert_TK = super().select(logit_TR, score_TR.masked_fill(is_hidden_TR, -torch.inf), context)
        return expert_TK.masked_fill(is_hidden_TR.gather(-1, expert_TK), self.sizes.num_routable)

    def weigh(self, scores: Scores, expert_TK: Tensor) -> Tensor:
        """Slots that stay empty, because fewer than K experts were left to choose from, score 0."""
        padded = scores._replace(
            score_TR=pad(scores.score_TR, (0, 1)), logit_TR=pad(scores.logit_TR, (0, 1), value=-torch.inf)
        )
        return super().weigh(padded, expert_TK)

    def _counts_in_sum(self, expert_TK: Tensor) -> Tensor:
        counts_TK, is_full_TK = super()._counts_in_sum(expert_TK), expert_TK < self.sizes.num_routable
        return is_full_TK if counts_TK is None else counts_TK & is_full_TK
