"""Routers that assign a training batch evenly by construction and choose greedily outside training.

In training a token's expert depends on the whole batch, later tokens included. Outside training routing is causal.

Shapes: T tokens, K experts per token, R routable experts.
"""

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...choice.top_k import top_experts
from ...contract.context import RoutingContext
from ...contract.router import RouterSizes
from .classic import ClassicRouter
from .rule import ClassicRule


class SinkhornRouter(ClassicRouter):
    """In training, the top K of the doubly normalised scores; weights are the raw gates.

    The gate is a sigmoid for K = 1, else a softmax over all experts. Source: Clark et al. 2022 (S-BASE),
    arXiv:2202.01169, appendix B; selection and gate in the form of Megatron-LM's router.

    Raises:
        ValueError: if the rule has groups or a balancing bias, which training would ignore.
    """

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule) -> None:
        _expect_plain_selection("sinkhorn", rule)
        super().__init__(sizes, layer, rule)

    def select(self, logit_TR: Tensor, score_TR: Tensor, context: RoutingContext) -> Tensor:
        greedy_TK = super().select(logit_TR, logit_TR, context)
        valid_T = _valid(logit_TR, context)
        if context.is_training and len(valid_T):
            greedy_TK[valid_T] = top_experts(sinkhorn(logit_TR[valid_T]), self.top_k(context))
        return greedy_TK


class BaseRouter(ClassicRouter):
    """In training, the assignment of equally many tokens to each expert that maximises the summed logits.

    The weight is the sigmoid of that logit. Source: Lewis et al. 2021 (BASE), arXiv:2103.16716, eqs. 2-4.

    Raises:
        ValueError: if K is not 1, or the rule has groups or a balancing bias.
    """

    has_fixed_top_k = True

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule) -> None:
        if sizes.top_k != 1:
            raise ValueError(f"base assigns exactly 1 expert to a token; got top_k = {sizes.top_k}")
        _expect_plain_selection("base", rule)
        super().__init__(sizes, layer, rule)

    def select(self, logit_TR: Tensor, score_TR: Tensor, context: RoutingContext) -> Tensor:
        greedy_TK = super().select(logit_TR, logit_TR, context)
        valid_T = _valid(logit_TR, context)
        if context.is_training and len(valid_T):
            greedy_TK[valid_T, 0] = balanced_assignment(logit_TR[valid_T])
        return greedy_TK


def sinkhorn(logit_TR: Tensor, tolerance: float = 1e-4, max_iterations: int = 1000) -> Tensor:
    """exp(logits) scaled so that every row sums to 1 / T and every column to 1 / R.

    Args:
        logit_TR: logits, of any size.
        tolerance: the mean absolute change of the column scaling at which iteration ends.
        max_iterations: at most so many.
    """
    # a common factor of a row or of everything does not matter, so large logits cannot overflow
    cost_TR = (logit_TR - logit_TR.amax(dim=-1, keepdim=True)).exp().clamp_min(torch.finfo(logit_TR.dtype).tiny)
    plan_TR = _scaled(cost_TR, tolerance, max_iterations)
    # scales of logits that differ by more than an exponential can hold overflow; their logarithms cannot
    return plan_TR if plan_TR.isfinite().all() else _scaled_logarithms(cost_TR.log(), tolerance, max_iterations).exp()


def _scaled(cost_TR: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    T, R = cost_TR.shape
    column_R = torch.ones_like(cost_TR[0])
    for _ in range(max_iterations):
        row_T = 1 / T / (cost_TR @ column_R)
        before_R, column_R = column_R, 1 / R / (row_T @ cost_TR)
        if (column_R / column_R.mean() - before_R / before_R.mean()).abs().mean() < tolerance:
            break
    row_T = 1 / T / (cost_TR @ column_R)
    return row_T[:, None] * cost_TR * column_R


def _scaled_logarithms(log_TR: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """Logarithms of `_scaled`; the tolerance is of the logarithms of the column scaling."""
    T, R = log_TR.shape
    column_R = torch.zeros_like(log_TR[0])
    for _ in range(max_iterations):
        row_T = -math.log(T) - (log_TR + column_R).logsumexp(dim=1)
        before_R, column_R = column_R, -math.log(R) - (row_T[:, None] + log_TR).logsumexp(dim=0)
        change_R = column_R - before_R
        if (change_R - change_R.mean()).abs().mean() < tolerance:
            break
    row_T = -math.log(T) - (log_TR + column_R).logsumexp(dim=1)
    return row_T[:, None] + log_TR + column_R


def balanced_assignment(score_TR: Tensor) -> Tensor:
    """int64 [T]: the experts of the assignment with the largest summed score and at most `ceil(T / R)` tokens each.

    Raises:
        ValueError: if a score is infinite or not a number.
    """
    T, R = score_TR.shape
    seats = math.ceil(T / R)
    cost = score_TR.double().cpu().numpy().repeat(seats, axis=1)
    if not np.isfinite(cost).all():
        raise ValueError(
            "an assignment of tokens to experts needs finite logits; got infinite ones or NaN. If training diverged, "
            "lower the learning rate; forbid no experts in training"
        )
    _, seat_T = linear_sum_assignment(cost, maximize=True)
    return torch.from_numpy(seat_T // seats).to(score_TR.device)


def _expect_plain_selection(name: str, rule: ClassicRule) -> None:
    """Raises ValueError for groups and biases, which would only change what is chosen outside training."""
    if rule.grouping.num_groups != 1 or rule.balance.bias_rate:
        raise ValueError(f"{name} balances by its assignment in training; leave num_groups and bias_rate out")


def _valid(logit_TR: Tensor, context: RoutingContext) -> Tensor:
    """int64 indices of the tokens that are not padding."""
    if context.is_valid_T is None:
        return torch.arange(len(logit_TR), device=logit_TR.device)
    return context.is_valid_T.nonzero()[:, 0]
