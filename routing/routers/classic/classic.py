"""ClassicRouter: one configurable score, select, weigh router that covers the classic ones.

Variants override one of its steps: `logits` (where scores come from), `score`, `select`, `weigh`, `thin`, or add a
`penalty_T`.

Shapes: T tokens, D model width, K experts per token, E FFN experts, R = E + Z routable experts.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...choice.top_k import top_experts
from ...contract.assignment import Routing
from ...contract.router import Carry, RouterModule, RouterSizes, RoutingContext, at_least_float32, drop_padding
from ...contract.stats import RouterStats
from ...losses.capacity import CAPACITY_POLICIES, limit_capacity, share_capacity_R, tutel_capacity
from .nulls import copy_ffn_rows_to_nulls
from .rule import ClassicRule

TINY = torch.finfo(torch.float32).tiny


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

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule, score_width: int | None = None) -> None:
        super().__init__(sizes, layer)
        rule.check_sizes(sizes)
        self.rule, self.balance_loss = rule, rule.balance_loss
        self.weight = nn.Parameter(torch.empty(sizes.num_routable, score_width or sizes.width))
        self.bias_R: Tensor | None
        self.register_buffer("bias_R", torch.zeros(sizes.num_routable) if rule.bias_rate else None)

    @property
    def most_choices(self) -> int:
        return self.rule.reachable(self.sizes)

    def init_parameters(self, std: float) -> None:
        super().init_parameters(std)
        self._init_weight(std)
        if self.bias_R is not None:
            nn.init.zeros_(self.bias_R)
        if self.rule.null_copy_noise is not None and not getattr(self.weight, "_is_hf_initialized", False):
            copy_ffn_rows_to_nulls(self.weight, self.sizes.num_experts, self.rule.null_copy_noise)

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        with torch.autocast(x_TD.device.type, enabled=False):
            logit_TR, carry = self.logits(self._jitter(at_least_float32(x_TD), context), carry, context)
            logit_TR = self.biased(logit_TR, context)
            probability_TR, score_TR = self.score(logit_TR)
            expert_TK = self.select(logit_TR.detach(), score_TR.detach(), context)
            chosen = drop_padding(self.routing(expert_TK, self.weigh(score_TR, expert_TK)), context)
            kept = self.drop_overflow(self.thin(chosen), context) if context.is_training else chosen
            stats = self.stats(
                chosen,
                kept,
                context,
                probability_TR=probability_TR,
                logit_TR=logit_TR,
                penalty_T=self.penalty_T(probability_TR, chosen, context),
            )
        return kept, carry, stats

    def logits(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry]:
        """[T, R] scores before any activation, and what the next layer's router is told."""
        return linear(x_TD, self.weight.to(x_TD.dtype)), carry

    def score(self, logit_TR: Tensor) -> tuple[Tensor, Tensor]:
        """The distribution that the balance loss sees, and the scores that select and weigh."""
        if self.rule.score == "sigmoid":
            score_TR = logit_TR.sigmoid()
            return score_TR / score_TR.sum(dim=-1, keepdim=True), score_TR
        probability_TR = logit_TR.softmax(dim=-1)
        return probability_TR, logit_TR if self.rule.score == "selected_softmax" else probability_TR

    def select(self, logit_TR: Tensor, score_TR: Tensor, context: RoutingContext) -> Tensor:
        """int64 [T, K], best first, without gradient. The balancing bias acts here and nowhere else."""
        if self.bias_R is not None:
            score_TR = score_TR + self.bias_R
        if self.rule.num_groups > 1:
            score_TR = self._mask_groups(score_TR)
        return top_experts(score_TR, self.top_k(context))

    def weigh(self, score_TR: Tensor, expert_TK: Tensor) -> Tensor:
        """[T, K] from the unbiased scores of the selected experts."""
        weight_TK = score_TR.gather(-1, expert_TK)
        counts_TK = self._counts_in_sum(expert_TK)
        if self.rule.score == "selected_softmax":
            weight_TK = _softmax(weight_TK) if counts_TK is None else _masked_softmax(weight_TK, counts_TK)
        elif self.rule.renormalise:
            weight_TK = weight_TK if counts_TK is None else torch.where(counts_TK, weight_TK, 0.0)
            weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True).clamp_min(TINY)
        return weight_TK * self.rule.scale

    def target_share_R(self, device: torch.device) -> Tensor | None:
        """FFN and zero-compute experts in the proportion of the rule; sums to 1."""
        if self.rule.ffn_share == 1:
            return None
        share_R = torch.ones(self.sizes.num_routable, dtype=torch.float64, device=device)
        share_R[: self.sizes.num_experts] = self.rule.ffn_share
        return share_R / share_R.sum()

    def penalty_T(self, probability_TR: Tensor, chosen: Routing, context: RoutingContext) -> Tensor | None:
        """Losses that the router weighs itself, per token; their mean over valid tokens is added. None for none."""
        return None

    def thin(self, chosen: Routing) -> Routing:
        """What training leaves out at random before capacities apply."""
        return chosen

    def drop_overflow(self, chosen: Routing, context: RoutingContext) -> Routing:
        """The routing within the capacity of the rule."""
        if self.rule.capacity_factor is None:
            return chosen
        kept = limit_capacity(chosen, self._capacity(chosen, context), CAPACITY_POLICIES[self.rule.capacity_policy])
        if not self.rule.renormalise_kept:
            return kept
        sum_T1 = kept.weight_TK.sum(dim=-1, keepdim=True).clamp_min(TINY)
        return self.routing(kept.expert_TK, kept.weight_TK / sum_T1 * self.rule.scale)

    @torch.no_grad()
    def post_step(self, count_R: Tensor, num_tokens: int) -> None:
        """Move the balancing bias towards the mean load, or the FFN experts' bias towards the target load.

        Source: Wang et al. 2024, arXiv:2408.15664, algorithm 1; with `target_load`, Meituan 2025 (LongCat-Flash),
        arXiv:2509.01322, section 2.1.1.
        """
        if self.bias_R is None:
            return
        load_R = count_R.to(self.bias_R)
        if self.rule.target_load is None:
            self.bias_R += self.rule.bias_rate * (load_R.mean() - load_R).sign()
        else:
            E = self.sizes.num_experts
            target_share = self.rule.target_load / self.sizes.top_k / E
            self.bias_R[:E] += self.rule.bias_rate * (target_share - load_R[:E] / load_R.sum().clamp_min(1))

    def _init_weight(self, std: float) -> None:
        rule = self.rule
        if rule.init_scale is not None:
            std = (rule.init_scale / self.weight.shape[-1]) ** 0.5
        if rule.init == "kaiming":
            nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        elif rule.init == "truncated":
            nn.init.trunc_normal_(self.weight, std=std, a=-rule.init_cut * std, b=rule.init_cut * std)
        elif rule.init_scale is not None:
            nn.init.normal_(self.weight, std=std)

    def _jitter(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        if not (context.is_training and self.rule.jitter):
            return x_TD
        return x_TD * torch.empty_like(x_TD).uniform_(1 - self.rule.jitter, 1 + self.rule.jitter)

    def _mask_groups(self, score_TR: Tensor) -> Tensor:
        """Scores with -inf outside each token's best groups. Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2."""
        grouped = score_TR.unflatten(-1, (self.rule.num_groups, -1))
        best = grouped.topk(2 if self.rule.group_score == "top2" and grouped.shape[-1] > 1 else 1, dim=-1).values
        kept = top_experts(best.sum(dim=-1), self.rule.groups_kept)
        is_kept = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=score_TR.device).scatter(-1, kept, True)
        return grouped.masked_fill(~is_kept[..., None], -torch.inf).flatten(-2)

    def _counts_in_sum(self, expert_TK: Tensor) -> Tensor | None:
        """Which selected slots the normalising sum runs over; None when all do."""
        if self.rule.normalise_over == "selected" or not self.sizes.num_zero_compute:
            return None
        if self.rule.normalise_over == "ffn":
            return expert_TK < self.sizes.num_experts
        is_nonzero = [kind != "zero" for kind in self.sizes.zero_compute]
        counts_R = torch.tensor([True] * self.sizes.num_experts + is_nonzero + [False])
        return counts_R.to(expert_TK.device)[expert_TK]

    def _capacity(self, chosen: Routing, context: RoutingContext) -> int | Tensor:
        """By tokens and K: what training left out by chance makes no expert smaller."""
        factor, (T, K), device = self.rule.capacity_factor, chosen.expert_TK.shape, chosen.expert_TK.device
        num_tokens = T if context.is_valid_T is None else context.is_valid_T.sum()
        if self.rule.capacity_rule == "tutel":
            return tutel_capacity(factor, count_R=chosen.count_R, num_tokens=int(num_tokens), top_k=K)
        share_R = self.target_share_R(device)
        if share_R is None:
            R = self.sizes.num_routable
            share_R = torch.full((R,), 1 / R, dtype=torch.float64, device=device)
        return share_capacity_R(factor, num_tokens * K, share_R)


def _softmax(logit_TK: Tensor) -> Tensor:
    """Softmax over the slots; on a CPU along columns, because torch has no vectors for rows as short as these."""
    if logit_TK.device.type != "cpu":
        return logit_TK.softmax(dim=-1)
    return logit_TK.T.contiguous().softmax(dim=0).T.contiguous()


def _masked_softmax(logit_TK: Tensor, counts_TK: Tensor) -> Tensor:
    """Softmax over the slots that count; 0 elsewhere and in rows where none counts. Other slots get no gradient."""
    any_T1 = counts_TK.any(dim=-1, keepdim=True)
    masked_TK = logit_TK.masked_fill(~counts_TK, -torch.inf)
    weight_TK = _softmax(torch.where(any_T1, masked_TK, 0.0))
    return torch.where(any_T1 & counts_TK, weight_TK, 0.0)
