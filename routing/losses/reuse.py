"""Losses that make neighbouring tokens choose the same experts, from the raw statistics that routers return.

Rows of the statistics are in the order of positions within each sequence. A pair is a token and the one before it in
its sequence; a loss is the mean over pairs, and 0 without any. What earlier tokens chose passes no gradient unless a
loss says so.

Shapes: T valid tokens, N rows that are pairs, R routable experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..contract.stats import RouterStats, mean_over_tokens

KEPT_SHARE = 0.9
"""What the moving average of past choices keeps per token: its weight halves in 6.6 tokens. Our choice."""


def replaced_l1_loss(stats: RouterStats) -> Tensor:
    """L1 distance of a pair's probabilities, times the experts that its second token replaces.

    The count passes no gradient; both tokens' probabilities do. Source: Meta 2025 (CoSMoEs, BlES), arXiv:2503.00245.
    """
    earlier_N, later_N = pairs(stats)
    used_TR = chosen_TR(stats)
    replaced_N = (used_TR[later_N] & ~used_TR[earlier_N]).sum(dim=-1)
    distance_N = (stats.probability_TR[later_N] - stats.probability_TR[earlier_N]).abs().sum(dim=-1)
    return mean_over_tokens(replaced_N * distance_N)


def consecutive_l2_loss(stats: RouterStats) -> Tensor:
    """Squared L2 distance of a pair's probabilities. Source: project-chronos 0.2.1 (2026), its temporal loss."""
    earlier_N, later_N = pairs(stats)
    return mean_over_tokens((stats.probability_TR[later_N] - stats.probability_TR[earlier_N]).square().sum(dim=-1))


def overlap_loss(stats: RouterStats) -> Tensor:
    """Negative log of the mean probability that a token gives to the experts chosen by the token before it.

    Source: project-chronos 0.2.1 (2026), its overlap loss.
    """
    earlier_N, later_N = pairs(stats)
    used_NR = chosen_TR(stats)[earlier_N].to(stats.probability_TR.dtype)
    mass_N = (used_NR * stats.probability_TR[later_N]).sum(dim=-1) / used_NR.sum(dim=-1).clamp_min(1.0)
    return mean_over_tokens(-_log(mass_N))


def recent_use_loss(stats: RouterStats) -> Tensor:
    """Negative log of the probability that a token gives to experts, weighted by how recently they were chosen.

    The weight of an expert is a moving average of its choices in the sequence, largest one 1. Source: Trust-region
    locality fine-tuning of BUAA 2026 (ReMoE), arXiv:2605.27081, for the idea; the form is ours.
    """
    _, later_N = pairs(stats)
    recent_NR = recent_use_TR(chosen_TR(stats), _starts_T(stats))[later_N].to(stats.probability_TR.dtype)
    return mean_over_tokens(-_log((recent_NR * stats.probability_TR[later_N]).sum(dim=-1)))


def no_reuse_loss(stats: RouterStats) -> Tensor:
    """Nothing."""
    return stats.probability_TR.new_zeros(())


REUSE_LOSSES: dict[str, Callable[[RouterStats], Tensor]] = {
    "replaced_l1": replaced_l1_loss,
    "l2": consecutive_l2_loss,
    "overlap": overlap_loss,
    "recent_use": recent_use_loss,
    "none": no_reuse_loss,
}


def anchor_loss(probability_TR: Tensor, anchor_TR: Tensor) -> Tensor:
    """Mean KL divergence in nats from an anchor's distributions, such as the router's before it was tuned.

    Args:
        probability_TR: of the router that is trained.
        anchor_TR: of the same tokens, without gradient.

    Source: BUAA 2026 (ReMoE), arXiv:2605.27081 (the trust-region KL to the original router).
    """
    gap_TR = torch.special.xlogy(anchor_TR, anchor_TR) - anchor_TR * _log(probability_TR)
    return mean_over_tokens(gap_TR.sum(dim=-1))


def adjacent_reuse(stats: RouterStats) -> Tensor:
    """Share of a token's experts that the token before it in its sequence chose, mean over pairs; no gradient."""
    earlier_N, later_N = pairs(stats)
    used_TR = chosen_TR(stats)
    kept_N = (used_TR[later_N] & used_TR[earlier_N]).sum(dim=-1) / used_TR[later_N].sum(dim=-1).clamp_min(1)
    return mean_over_tokens(kept_N.to(stats.probability_TR.dtype))


def pairs(stats: RouterStats) -> tuple[Tensor, Tensor]:
    """int64 rows of the first and the second token of each pair."""
    later_N = (~_starts_T(stats)).nonzero()[:, 0]
    return later_N - 1, later_N


def chosen_TR(stats: RouterStats) -> Tensor:
    """Bool: which experts each token chose."""
    chosen, R = stats.chosen.expert_TK, stats.chosen.num_routable
    return torch.zeros(len(chosen), R + 1, dtype=torch.bool, device=chosen.device).scatter(1, chosen, True)[:, :R]


def recent_use_TR(used_TR: Tensor, starts_T: Tensor) -> Tensor:
    """Float32: moving average of each sequence's choices before the token, its largest entry 1; 0 at a start."""
    place_T = torch.arange(len(used_TR), device=used_TR.device)
    age_T = place_T - torch.where(starts_T, place_T, 0).cummax(dim=0).values if len(used_TR) else place_T
    average_TR = torch.zeros(used_TR.shape, device=used_TR.device)
    # tokens of one age, one per sequence, depend on those that are one younger
    for age in range(1, int(age_T.max()) + 1 if len(used_TR) else 1):
        own = (age_T == age).nonzero()[:, 0]
        average_TR[own] = KEPT_SHARE * average_TR[own - 1] + used_TR[own - 1].float()
    return average_TR / average_TR.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _starts_T(stats: RouterStats) -> Tensor:
    """Bool: the first token of each sequence.

    Raises:
        ValueError: if the statistics do not say which sequence a token belongs to.
    """
    if stats.sequence_T is None:
        raise ValueError("reuse losses need sequence_T in the routing context; got none")
    starts_T = torch.ones_like(stats.sequence_T, dtype=torch.bool)
    starts_T[1:] = stats.sequence_T.diff() != 0
    return starts_T


def _log(x: Tensor) -> Tensor:
    """Logarithms of probabilities, which may have underflowed to 0."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).log()
