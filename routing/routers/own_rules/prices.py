"""Routers whose experts have prices that balance a training batch at once: by a linear programme, or by quantiles.

Shapes: T tokens, K experts per token, R routable experts.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ...choice.top_k import top_experts
from ...contract.context import RoutingContext
from ...contract.router import RouterSizes
from ..classic.classic import ClassicRouter
from ..classic.rule import RULE_PARTS, ClassicRule
from ..options import Options, expect_at_least

Prices = Literal["programme", "quantile"]


@dataclass(frozen=True, kw_only=True)
class PriceOptions(Options):
    """Options of priced routing besides those of the rule.

    Args:
        prices: `programme`: prices are duals of inequalities, so none is negative; `quantile`: of equalities, and an
            expert that few tokens want is paid.
        rounds: steps of the alternating solution per training batch, at least 1.
    """

    prices: Prices = "programme"
    rounds: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_at_least("rounds", self.rounds, 1)


class PricedRouter(ClassicRouter):
    """Chooses by score minus price; a training batch finds its prices, later calls use those of the last one.

    The problem: maximise the summed scores of T K choices so that no expert takes more than T K / R. In training a
    choice depends on the whole batch; outside training it is causal. Weights have no price in them.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves.
        rule: how logits become a routing; without groups or a bias, whose work prices do.
        options: kind of prices, and rounds.

    Raises:
        ValueError: if the rule has groups or a balancing bias.

    Source: `programme`: Sun 2025 (BIP-based balancing), arXiv:2502.15451, algorithm 1; `quantile`: Su 2026, kexue.fm
    11619 (balancing as optimal allocation).
    """

    option_groups: ClassVar[tuple[type, ...]] = (*RULE_PARTS, PriceOptions)

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule, options: PriceOptions) -> None:
        if rule.grouping.num_groups != 1 or rule.balance.bias_rate:
            raise ValueError("prices balance by themselves; leave num_groups and bias_rate out")
        super().__init__(sizes, layer, rule)
        self.options = options
        self.register_buffer("price_R", torch.zeros(sizes.num_routable))
        self._latest: Tensor | None = None

    def init_parameters(self, std: float) -> None:
        super().init_parameters(std)
        nn.init.zeros_(self.price_R)

    def select(self, logit_TR: Tensor, score_TR: Tensor, context: RoutingContext) -> Tensor:
        price_R, top_k = self.price_R.to(score_TR), self.top_k(context)
        valid_TR = score_TR if context.is_valid_T is None else score_TR[context.is_valid_T]
        if context.is_training and len(valid_TR):
            price_R = balancing_prices(
                valid_TR, price_R, top_k, rounds=self.options.rounds, is_signed=self.options.prices == "quantile"
            )
            self._latest = price_R
        return top_experts(score_TR - price_R, top_k)

    def notes(self) -> list[Tensor]:
        return [] if self._latest is None else [self._latest]

    @torch.no_grad()
    def post_step(self, count_R: Tensor, num_tokens: int) -> None:
        """Keep the prices of the step's last micro-batch."""
        super().post_step(count_R, num_tokens)
        if self._latest is not None:
            self.price_R.copy_(self._latest)


def balancing_prices(score_TR: Tensor, price_R: Tensor, top_k: int, *, rounds: int, is_signed: bool) -> Tensor:
    """Prices with which the K best experts of each token are nearly evenly loaded.

    Args:
        score_TR: scores of a batch, without gradient.
        price_R: where the alternation starts.
        top_k: K, experts per token.
        rounds: steps of pricing tokens, then experts; at least 1.
        is_signed: whether prices may be negative.
    """
    T, R = score_TR.shape
    seats = max(1, -(-T * top_k // R))
    if top_k >= R or seats >= T:
        return torch.zeros_like(price_R)
    for _ in range(rounds):
        # what a token's best refused expert is worth to it, then what an expert's best refused token is worth
        token_T1 = (score_TR - price_R).topk(top_k + 1, dim=1).values[:, -1:]
        token_T1 = token_T1 if is_signed else token_T1.clamp_min(0.0)
        price_R = (score_TR - token_T1).topk(seats + 1, dim=0).values[-1]
        price_R = price_R if is_signed else price_R.clamp_min(0.0)
    return price_R
