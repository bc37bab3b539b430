"""Expert choice: each expert picks its tokens, later ones included, so such a model cannot generate.

Shapes: T tokens, D model width, R routable experts.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...contract.assignment import Routing
from ...contract.context import Carry, RoutingContext
from ...contract.module import at_least_float32
from ...contract.router import RouterSizes
from ...contract.stats import RouterStats
from ..options import Options
from .classic import ClassicRouter
from .rule import RULE_PARTS, Balance, ClassicRule

# Added before a product is cut to a whole number: 2.3 * 10 is below 23 in binary.
SLACK = 1e-6


@dataclass(frozen=True, kw_only=True)
class ExpertChoiceOptions(Options):
    """The option of expert choice; those of a token-choice rule must keep their defaults.

    Args:
        mean_experts: c, experts per token on average, 0 < c <= E + Z; K if not given.
    """

    mean_experts: float | None = None


class ExpertChoiceRouter(ClassicRouter):
    """Every expert takes the `C = c T / R` tokens with its largest scores; a token gets 0 to R experts.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves.
        rule: its score must be `softmax`; the rest of a token-choice rule does not apply.
        options: how many experts per token on average.

    Source: Zhou et al. 2022, arXiv:2202.09368, eqs. 1-2. Balanced by construction: no loss, no renormalisation.
    """

    is_causal = False

    option_groups: ClassVar[tuple[type, ...]] = (*RULE_PARTS, ExpertChoiceOptions)

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule, options: ExpertChoiceOptions) -> None:
        if rule != ClassicRule(balance=Balance(balance_loss="none")):
            raise ValueError("expert_choice has no token-choice rule; its only option is mean_experts")
        mean_experts = options.mean_experts
        if mean_experts is not None and not 0 < mean_experts <= sizes.num_routable:
            raise ValueError(f"mean_experts must lie in 0..{sizes.num_routable} (E + Z); got {mean_experts}")
        super().__init__(sizes, layer, rule)
        self.mean_experts = mean_experts
        self.has_fixed_top_k = mean_experts is not None

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        with torch.autocast(x_TD.device.type, enabled=False):
            logit_TR, carry = self.logits(at_least_float32(x_TD), carry, context)
            logit_TR = self.biased(logit_TR, context)
            probability_TR = logit_TR.softmax(dim=-1)
            is_chosen_TR = self._pick(probability_TR.detach(), context)
            routing = Routing.from_dense(probability_TR, is_chosen_TR, num_experts=self.sizes.num_experts)
        return routing, carry, self.stats(routing, routing, context, probability_TR=probability_TR, logit_TR=logit_TR)

    def _pick(self, probability_TR: Tensor, context: RoutingContext) -> Tensor:
        T, R = probability_TR.shape
        if context.is_valid_T is not None:
            T = int(context.is_valid_T.sum())
            probability_TR = probability_TR.masked_fill(~context.is_valid_T[:, None], -1.0)
        top_k = self.top_k(context)
        mean_experts = top_k if self.mean_experts is None else self.mean_experts
        capacity = min(T, max(1, int(mean_experts * T / R + SLACK)))
        token_CR = probability_TR.topk(capacity, dim=0).indices
        return torch.zeros_like(probability_TR, dtype=torch.bool).scatter(0, token_CR, True)
