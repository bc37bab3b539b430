"""ClassicRouter: one configurable score, select, weigh router that covers the classic ones.

Variants override one of its steps: `logits` (where scores come from), `score`, `choosable`, `select`, `weigh`, `thin`,
or add a `penalty_T`.

Shapes: T tokens, D model width, K experts per token, E FFN experts, R = E + Z routable experts.
"""

from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, logsigmoid

from ...choice.normalise import as_shares, log_sqrt_softplus, masked_softmax, normalised, softmax, sqrt_softplus
from ...choice.top_k import top_experts
from ...contract.assignment import Routing
from ...contract.context import Carry, RoutingContext
from ...contract.module import RouterModule, at_least_float32, drop_padding
from ...contract.router import RouterSizes
from ...contract.stats import RouterStats
from ...losses.capacity import CAPACITY_POLICIES, limit_capacity, share_capacity_R, tutel_capacity
from ..constant_weights import warn_of_constant_weights
from .nulls import copy_ffn_rows_to_nulls
from .rule import RULE_PARTS, ClassicRule


class Scores(NamedTuple):
    """What a router makes of its logits.

    Args:
        probability_TR: the distribution that the balance loss sees.
        score_TR: what selects and weighs.
        logit_TR: the logits that were scored; they normalise weights whose scores underflow.
    """

    probability_TR: Tensor
    score_TR: Tensor
    logit_TR: Tensor


class ClassicRouter(RouterModule):
    """Linear scorer, top-k selector, weigher; computes in float32 (or float64 with a float64 model).

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves.
        rule: how logits become a routing.
        score_width: what the scores are linear in, if not the D-wide hidden state.

    Raises:
        ValueError: if groups do not divide the experts or leave fewer than K of them, or the load target does not fit.
    """

    option_groups: ClassVar[tuple[type, ...]] = RULE_PARTS

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule, score_width: int | None = None) -> None:
        super().__init__(sizes, layer)
        rule.check_sizes(sizes)
        if sizes.top_k == 1 and rule.scoring.is_normalised:
            warn_of_constant_weights(type(self).__name__)
        self.rule, self.balance_loss = rule, rule.balance.balance_loss
        self.weight = nn.Parameter(torch.empty(sizes.num_routable, score_width or sizes.width))
        self.bias_R: Tensor | None
        self.register_buffer("bias_R", torch.zeros(sizes.num_routable) if rule.balance.bias_rate else None)
        is_global = rule.balance.balance_loss == "global_batch"
        self.step_load_R: Tensor | None
        self.register_buffer("step_load_R", torch.zeros(sizes.num_routable) if is_global else None)

    @classmethod
    def build(cls, sizes: RouterSizes, *options: Any) -> list[nn.Module]:
        """One router per MoE layer, of the parts of a rule and what options the class adds."""
        num_parts = len(RULE_PARTS)
        return cls.of_rule(sizes, ClassicRule.of_parts(*options[:num_parts]), *options[num_parts:])

    @classmethod
    def of_rule(cls, sizes: RouterSizes, rule: ClassicRule, *own: Any) -> list[Self]:
        """One router per MoE layer; `own` are the options that the class adds to those of the rule."""
        return [cls(sizes, layer, rule, *own) for layer in range(sizes.num_layers)]

    @property
    def most_choices(self) -> int:
        return self.rule.grouping.reachable(self.sizes)

    def init_parameters(self, std: float) -> None:
        super().init_parameters(std)
        self._init_weight(std)
        for buffer in (self.bias_R, self.step_load_R):
            if buffer is not None:
                nn.init.zeros_(buffer)
        noise = self.rule.initial.null_copy_noise
        if noise is not None and not getattr(self.weight, "_is_hf_initialized", False):
            copy_ffn_rows_to_nulls(self.weight, self.sizes.num_experts, noise)

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        with torch.autocast(x_TD.device.type, enabled=False):
            logit_TR, carry = self.logits(self._jitter(at_least_float32(x_TD), context), carry, context)
            logit_TR = self.biased(logit_TR, context)
            scores = self.score(logit_TR)
            choosable_TR, carry = self.choosable(scores, carry, context)
            expert_TK = self.select(logit_TR.detach(), choosable_TR, context)
            chosen = drop_padding(self.routing(expert_TK, self.weigh(scores, expert_TK)), context)
            kept = self.drop_overflow(self.thin(chosen), context) if context.is_training else chosen
            stats = self.stats(
                chosen,
                kept,
                context,
                probability_TR=scores.probability_TR,
                logit_TR=logit_TR,
                penalty_T=self.penalty_T(scores.probability_TR, chosen, context),
            )
        return kept, carry, stats if self.step_load_R is None else replace(stats, step_load_R=self.step_load_R)

    def logits(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry]:
        """[T, R] scores before any activation, and what the next layer's router is told."""
        return linear(x_TD, self.weight.to(x_TD.dtype)), carry

    def score(self, logit_TR: Tensor) -> Scores:
        """The activation of the rule."""
        if self.rule.scoring.score in ("sigmoid", "sqrt_softplus"):
            is_sigmoid = self.rule.scoring.score == "sigmoid"
            score_TR = logit_TR.sigmoid() if is_sigmoid else sqrt_softplus(logit_TR)
            probability_TR = normalised(score_TR, lambda: self.log_score(logit_TR).softmax(dim=-1))
            return Scores(probability_TR, score_TR, logit_TR)
        probability_TR = logit_TR.softmax(dim=-1)
        is_selected = self.rule.scoring.score == "selected_softmax"
        return Scores(probability_TR, logit_TR if is_selected else probability_TR, logit_TR)

    def log_score(self, logit: Tensor) -> Tensor:
        """Logarithms of the scores, up to a constant per token."""
        if self.rule.scoring.score == "sqrt_softplus":
            return log_sqrt_softplus(logit)
        return logsigmoid(logit) if self.rule.scoring.score == "sigmoid" else logit

    def choosable(self, scores: Scores, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry]:
        """Scores without gradient, -inf for experts that a token may not choose, and what the next router is told."""
        return scores.score_TR.detach(), carry

    def select(self, logit_TR: Tensor, score_TR: Tensor, context: RoutingContext) -> Tensor:
        """int64 [T, K], best first, without gradient. The balancing bias acts here and nowhere else."""
        if self.bias_R is not None:
            score_TR = score_TR + self.bias_R
        if self.rule.grouping.num_groups > 1:
            score_TR = self._mask_groups(score_TR)
        return top_experts(score_TR, self.top_k(context))

    def weigh(self, scores: Scores, expert_TK: Tensor) -> Tensor:
        """[T, K] from the unbiased scores of the selected experts."""
        weight_TK = scores.score_TR.gather(-1, expert_TK)
        counts_TK = self._counts_in_sum(expert_TK)
        if self.rule.scoring.score == "selected_softmax":
            weight_TK = softmax(weight_TK) if counts_TK is None else masked_softmax(weight_TK, counts_TK)
        elif self.rule.scoring.renormalise:
            weight_TK = weight_TK if counts_TK is None else torch.where(counts_TK, weight_TK, 0.0)
            weight_TK = normalised(weight_TK, lambda: self._weights_by_logits(scores.logit_TR, expert_TK, counts_TK))
        return weight_TK * self.rule.scoring.scale

    def target_share_R(self, device: torch.device) -> Tensor | None:
        """FFN and zero-compute experts in the proportion of the rule; sums to 1."""
        if self.rule.balance.ffn_share == 1:
            return None
        share_R = torch.ones(self.sizes.num_routable, dtype=torch.float64, device=device)
        share_R[: self.sizes.num_experts] = self.rule.balance.ffn_share
        return share_R / share_R.sum()

    def penalty_T(self, probability_TR: Tensor, chosen: Routing, context: RoutingContext) -> Tensor | None:
        """Losses that the router weighs itself, per token; their mean over valid tokens is added. None for none."""
        return None

    def thin(self, chosen: Routing) -> Routing:
        """What training leaves out at random before capacities apply."""
        return chosen

    def drop_overflow(self, chosen: Routing, context: RoutingContext) -> Routing:
        """The routing within the capacity of the rule."""
        rule = self.rule.capacity
        if rule.capacity_factor is None:
            return chosen
        kept = limit_capacity(chosen, self._capacity(chosen, context), CAPACITY_POLICIES[rule.capacity_policy])
        if not rule.renormalise_kept:
            return kept
        return self.routing(kept.expert_TK, as_shares(kept.weight_TK) * self.rule.scoring.scale)

    @torch.no_grad()
    def post_step(self, count_R: Tensor, num_tokens: int) -> None:
        """Move the balancing bias towards the mean load, or the FFN experts' bias towards the target load.

        Raises:
            ValueError: if a count is negative or not a number, which would spoil the bias for good.

        Source: Wang et al. 2024, arXiv:2408.15664, algorithm 1; with `target_load`, Meituan 2025 (LongCat-Flash),
        arXiv:2509.01322, section 2.1.1.
        """
        if self.step_load_R is not None:
            self.step_load_R.copy_(self.expect_counts(count_R))
        if self.bias_R is None:
            return
        rule, load_R = self.rule.balance, self.expect_counts(count_R).to(self.bias_R)
        if rule.target_load is None:
            self.bias_R += rule.bias_rate * (load_R.mean() - load_R).sign()
        else:
            E = self.sizes.num_experts
            target_share = rule.target_load / self.sizes.top_k / E
            self.bias_R[:E] += rule.bias_rate * (target_share - load_R[:E] / load_R.sum().clamp_min(1))

    def _init_weight(self, std: float) -> None:
        rule = self.rule.initial
        if rule.init_scale is not None:
            std = (rule.init_scale / self.weight.shape[-1]) ** 0.5
        if rule.init == "kaiming":
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        elif rule.init == "truncated":
            nn.init.trunc_normal_(self.weight, std=std, a=-rule.init_cut * std, b=rule.init_cut * std)
        elif rule.init_scale is not None:
            nn.init.normal_(self.weight, std=std)

    def _jitter(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        jitter = self.rule.scoring.jitter
        if not (context.is_training and jitter):
            return x_TD
        return x_TD * torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)

    def _mask_groups(self, score_TR: Tensor) -> Tensor:
        """Scores with -inf outside each token's best groups. Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2."""
        rule = self.rule.grouping
        grouped = score_TR.unflatten(-1, (rule.num_groups, -1))
        best = grouped.topk(2 if rule.group_score == "top2" and grouped.shape[-1] > 1 else 1, dim=-1).values
        kept = top_experts(best.sum(dim=-1), rule.groups_kept)
        is_kept = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=score_TR.device).scatter(-1, kept, True)
        return grouped.masked_fill(~is_kept[..., None], -torch.inf).flatten(-2)

    def _weights_by_logits(self, logit_TR: Tensor, expert_TK: Tensor, counts_TK: Tensor | None) -> Tensor:
        """Renormalised weights of the selected experts without their scores, which may have underflowed."""
        counts_TK = torch.ones_like(expert_TK, dtype=torch.bool) if counts_TK is None else counts_TK
        return masked_softmax(self.log_score(logit_TR.gather(-1, expert_TK)), counts_TK)

    def _counts_in_sum(self, expert_TK: Tensor) -> Tensor | None:
        """Which selected slots the normalising sum runs over; None when all do."""
        over = self.rule.scoring.normalise_over
        if over == "selected" or not self.sizes.num_zero_compute:
            return None
        if over == "ffn":
            return expert_TK < self.sizes.num_experts
        is_nonzero = [kind != "zero" for kind in self.sizes.zero_compute]
        counts_R = torch.tensor([True] * self.sizes.num_experts + is_nonzero + [False])
        return counts_R.to(expert_TK.device)[expert_TK]

    def _capacity(self, chosen: Routing, context: RoutingContext) -> int | Tensor:
        """By tokens and K: what training left out by chance makes no expert smaller."""
        rule, (T, K), device = self.rule.capacity, chosen.expert_TK.shape, chosen.expert_TK.device
        num_tokens = T if context.is_valid_T is None else context.is_valid_T.sum()
        if rule.capacity_rule == "tutel":
            return tutel_capacity(rule.capacity_factor, count_R=chosen.count_R, num_tokens=int(num_tokens), top_k=K)
        share_R = self.target_share_R(device)
        if share_R is None:
            R = self.sizes.num_routable
            share_R = torch.full((R,), 1 / R, dtype=torch.float64, device=device)
        return share_capacity_R(rule.capacity_factor, num_tokens * K, share_R)
