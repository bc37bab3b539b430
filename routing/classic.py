"""ClassicRouter: one configurable score, select, weigh router that covers the classic ones.

Shapes: T tokens, D model width, K experts per token, R = E + Z routable experts.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .assignment import Routing
from .capacity import CAPACITY_POLICIES, limit_capacity
from .router import Carry, RouterSizes, RouterStats, RoutingContext, router_stats


@dataclass(frozen=True, kw_only=True)
class ClassicRule:
    """How logits become a routing.

    Args:
        score: `softmax` over all routable experts, `selected_softmax` over the K selected logits, or `sigmoid`.
        renormalise: divide the selected weights by their sum.
        scale: multiplies the weights.
        num_groups: experts form this many equal groups; 1 means no groups.
        groups_kept: a token may only use experts of its best groups.
        group_score: a group is as good as its `max` score, or the sum of its `top2`.
        bias_rate: step of the loss-free balancing bias, which takes part in selection only; 0 turns it off.
        capacity_factor: an expert takes at most `ceil(factor * T * K / R)` tokens in training; None drops nothing.
        capacity_policy: `first`, `priority` or `random`: who stays when an expert overflows.
        jitter: in training, inputs are multiplied by uniform noise in `1 - jitter .. 1 + jitter`.

    Raises:
        ValueError: if a setting is unknown or out of range.
    """

    score: Literal["softmax", "selected_softmax", "sigmoid"] = "softmax"
    renormalise: bool = False
    scale: float = 1.0
    num_groups: int = 1
    groups_kept: int = 1
    group_score: Literal["max", "top2"] = "max"
    bias_rate: float = 0.0
    capacity_factor: float | None = None
    capacity_policy: str = "first"
    jitter: float = 0.0

    def __post_init__(self) -> None:
        _expect_one_of("score", self.score, ("softmax", "selected_softmax", "sigmoid"))
        _expect_one_of("group_score", self.group_score, ("max", "top2"))
        _expect_one_of("capacity_policy", self.capacity_policy, tuple(CAPACITY_POLICIES))
        if not 1 <= self.groups_kept <= self.num_groups:
            raise ValueError(f"groups_kept must lie in 1..{self.num_groups} (num_groups); got {self.groups_kept}")
        if self.capacity_factor is not None and self.capacity_factor <= 0:
            raise ValueError(f"capacity_factor must be positive; got {self.capacity_factor}")


class ClassicRouter(nn.Module):
    """Linear scorer, top-k selector, weigher; computes in float32 whatever the dtype of its input.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves.
        rule: how logits become a routing.

    Raises:
        ValueError: if the groups do not divide the experts or leave fewer than K of them.
    """

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule) -> None:
        super().__init__()
        self.sizes, self.layer, self.rule = sizes, layer, rule
        if sizes.num_routable % rule.num_groups:
            raise ValueError(f"{sizes.num_routable} experts do not divide into {rule.num_groups} groups")
        reachable = sizes.num_routable // rule.num_groups * rule.groups_kept
        if reachable < sizes.top_k:
            raise ValueError(f"{rule.groups_kept} groups hold {reachable} experts, fewer than top_k = {sizes.top_k}")
        self.weight = nn.Parameter(torch.empty(sizes.num_routable, sizes.width))
        self.bias_R: Tensor | None
        self.register_buffer("bias_R", torch.zeros(sizes.num_routable) if rule.bias_rate else None)

    def begin(self, context: RoutingContext) -> Carry:
        return Carry()

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        logit_TR = self.logits(x_TD, context)
        probability_TR, score_TR = self.score(logit_TR)
        expert_TK = self.select(score_TR)
        chosen = Routing(
            expert_TK=expert_TK,
            weight_TK=self.weigh(score_TR, expert_TK),
            num_experts=self.sizes.num_experts,
            num_zero_compute=self.sizes.num_zero_compute,
        )
        if context.is_valid_T is not None:
            chosen = chosen.drop(~context.is_valid_T[:, None].expand_as(expert_TK))
        kept = self.drop_overflow(chosen) if context.is_training else chosen
        return kept, carry, router_stats(probability_TR, logit_TR, chosen, kept, context.is_valid_T)

    def logits(self, x_TD: Tensor, context: RoutingContext) -> Tensor:
        """float32 [T, R]."""
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            if context.is_training and self.rule.jitter:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.rule.jitter, 1 + self.rule.jitter)
            logit_TR = linear(x_TD, self.weight.float())
        if context.logit_bias_LR is not None:
            logit_TR = logit_TR + context.logit_bias_LR[self.layer]
        return logit_TR

    def score(self, logit_TR: Tensor) -> tuple[Tensor, Tensor]:
        """The distribution that the balance loss sees, and the scores that select and weigh."""
        if self.rule.score == "sigmoid":
            score_TR = logit_TR.sigmoid()
            return score_TR / score_TR.sum(dim=-1, keepdim=True), score_TR
        probability_TR = logit_TR.softmax(dim=-1)
        return probability_TR, logit_TR if self.rule.score == "selected_softmax" else probability_TR

    def select(self, score_TR: Tensor) -> Tensor:
        """int64 [T, K], best first. The balancing bias acts here and nowhere else."""
        score_TR = score_TR.detach()
        if self.bias_R is not None:
            score_TR = score_TR + self.bias_R
        if self.rule.num_groups > 1:
            score_TR = self._mask_groups(score_TR)
        return score_TR.topk(self.sizes.top_k, dim=-1).indices

    def weigh(self, score_TR: Tensor, expert_TK: Tensor) -> Tensor:
        """float32 [T, K] from the unbiased scores of the selected experts."""
        weight_TK = score_TR.gather(-1, expert_TK)
        if self.rule.score == "selected_softmax":
            weight_TK = weight_TK.softmax(dim=-1)
        if self.rule.renormalise:
            weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return weight_TK * self.rule.scale

    def drop_overflow(self, chosen: Routing) -> Routing:
        """The routing within the capacity of the rule."""
        if self.rule.capacity_factor is None:
            return chosen
        capacity = math.ceil(self.rule.capacity_factor * chosen.expert_TK.numel() / self.sizes.num_routable)
        return limit_capacity(chosen, capacity, CAPACITY_POLICIES[self.rule.capacity_policy])

    @torch.no_grad()
    def post_step(self, count_R: Tensor) -> None:
        """Move the balancing bias of each expert by one step towards the mean load.

        Source: Wang et al. 2024, arXiv:2408.15664, algorithm 1.
        """
        if self.bias_R is not None:
            load_R = count_R.float()
            self.bias_R += self.rule.bias_rate * (load_R.mean() - load_R).sign()

    def _mask_groups(self, score_TR: Tensor) -> Tensor:
        """Scores with -inf outside each token's best groups. Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2."""
        grouped = score_TR.unflatten(-1, (self.rule.num_groups, -1))
        best = grouped.topk(2 if self.rule.group_score == "top2" and grouped.shape[-1] > 1 else 1, dim=-1).values
        kept = best.sum(dim=-1).topk(self.rule.groups_kept, dim=-1).indices
        is_kept = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=score_TR.device).scatter(-1, kept, True)
        return grouped.masked_fill(~is_kept[..., None], -torch.inf).flatten(-2)


def _expect_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
