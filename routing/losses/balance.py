"""Losses that keep routers balanced and their logits small, from the raw statistics that routers return.

Conventions, pinned here for the whole project: one loss per layer, averaged over layers (never pooled, a pooled loss
hides a collapsed layer); the load shares sum to 1, so every balance loss but `entropy` is 1 when load and probability
are as they should be, whatever K is. A paper whose shares sum to K needs a coefficient K times smaller for the same
effect. Load shares pass no gradient; mean probabilities do.

Shapes: T valid tokens, E FFN experts, R = E + Z routable experts, B sequences.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..contract.stats import RouterStats, mean_over_tokens
from .reuse import REUSE_LOSSES


def switch_balance_loss(stats: RouterStats) -> Tensor:
    """Load shares times mean probabilities over target shares, summed; 1 when both are as targeted.

    With uniform targets this is R times the dot product of both. With targets in proportion tau : 1 for FFN and
    zero-compute experts it is the weighted loss of MoE++.

    Source: Fedus et al. 2022 (Switch), arXiv:2101.03961, eq. 4, with shares of all K choices; Jin et al. 2024 (MoE++),
    arXiv:2410.07348, eq. 7.
    """
    return _dot(_share(stats.count_R, stats.probability_R), stats.probability_R, stats.target_share_R)


def null_averaged_balance_loss(stats: RouterStats) -> Tensor:
    """The Switch loss with one common load for all zero-compute experts, so that only their sum is balanced.

    Source: Zeng et al. 2024 (AdaMoE), arXiv:2406.13233, eq. 6.
    """
    share_R = _share(stats.count_R, stats.probability_R)
    share_E, share_Z = share_R[: stats.num_experts], share_R[stats.num_experts :]
    if len(share_Z):
        share_R = torch.cat([share_E, share_Z.mean().expand_as(share_Z)])
    return _dot(share_R, stats.probability_R, stats.target_share_R)


def first_choice_balance_loss(stats: RouterStats) -> Tensor:
    """The Switch loss with the load of first choices only. Source: Lepikhin et al. 2020 (GShard), arXiv:2006.16668."""
    first_T = stats.chosen.expert_TK[:, 0]
    count_R = torch.bincount(first_T, minlength=stats.chosen.num_routable + 1)[: stats.chosen.num_routable]
    return _dot(_share(count_R, stats.probability_R), stats.probability_R, stats.target_share_R)


def sequence_balance_loss(stats: RouterStats) -> Tensor:
    """The Switch loss of each sequence by itself, averaged over sequences.

    Source: DeepSeek-AI 2024 (DeepSeek-V3), arXiv:2412.19437, eqs. 17-20.
    """
    if stats.sequence_T is None:
        raise ValueError("the sequence-wise balance loss needs sequence_T in the routing context; got none")
    if not stats.num_tokens:
        return stats.probability_TR.sum()
    R, K = stats.chosen.num_routable, stats.chosen.expert_TK.shape[1]
    num_sequences = int(stats.sequence_T.max()) + 1
    token_B = torch.bincount(stats.sequence_T, minlength=num_sequences).clamp_min(1)
    cell_N = (stats.sequence_T[:, None] * (R + 1) + stats.chosen.expert_TK).flatten()
    count_BR = torch.bincount(cell_N, minlength=num_sequences * (R + 1)).view(num_sequences, R + 1)[:, :R]
    total_BR = stats.probability_TR.new_zeros(num_sequences, R).index_add(0, stats.sequence_T, stats.probability_TR)
    share_BR = count_BR.to(total_BR.dtype) / (K * token_B[:, None])
    loss_B = R * (share_BR * total_BR / token_B[:, None]).sum(dim=-1)
    return loss_B[torch.bincount(stats.sequence_T, minlength=num_sequences) > 0].mean()


def entropy_balance_loss(stats: RouterStats) -> Tensor:
    """Negative entropy of the batch-mean softmax of the logits: `-log R` when it is uniform.

    Source: Csordas et al. 2023 (sigma-MoE), arXiv:2310.10837, eqs. 20-21.
    """
    if stats.logit_TR is None:
        raise ValueError("the entropy balance loss needs router logits; this router has none")
    mean_R = mean_over_tokens(stats.logit_TR.softmax(dim=-1))
    # the slope of entropy is infinite at 0, where an expert that no token gives any probability stands
    return -torch.special.entr(torch.where(mean_R > 0, mean_R, 1.0)).sum()


def global_batch_balance_loss(stats: RouterStats) -> Tensor:
    """The Switch loss with the loads of the last optimiser step, over all its micro-batches and processes.

    A micro-batch of one domain may load its experts unevenly, as long as the step does not. The published loss sums
    loads within the step; ours is one step behind, and needs no exchange of its own. The first step has its own loads.

    Source: Qiu et al. 2025 (Qwen), arXiv:2501.11873, section 3.
    """
    if stats.step_load_R is None:
        raise ValueError("the global-batch balance loss needs a router that keeps the step's loads; this one does not")
    count_R = torch.where(stats.step_load_R.sum() > 0, stats.step_load_R, stats.count_R.to(stats.step_load_R))
    return _dot(_share(count_R, stats.probability_R), stats.probability_R, stats.target_share_R)


def no_balance_loss(stats: RouterStats) -> Tensor:
    """Nothing: for routers that are balanced by construction or by a bias."""
    return stats.probability_TR.new_zeros(())


BALANCE_LOSSES: dict[str, Callable[[RouterStats], Tensor]] = {
    "switch": switch_balance_loss,
    "null_averaged": null_averaged_balance_loss,
    "first_choice": first_choice_balance_loss,
    "sequence": sequence_balance_loss,
    "entropy": entropy_balance_loss,
    "global_batch": global_batch_balance_loss,
    "none": no_balance_loss,
}


def z_loss(stats: RouterStats) -> Tensor:
    """Mean squared log-partition of the router logits. Source: Zoph et al. 2022 (ST-MoE), arXiv:2202.08906, eq. 5."""
    return mean_over_tokens(stats.logsumexp_T.square())


def auxiliary_loss(
    stats: Sequence[RouterStats],
    *,
    balance_weight: float,
    z_weight: float,
    reuse_loss: str = "none",
    reuse_weight: float = 0.0,
) -> Tensor:
    """The weighted sum of each router's balance loss, the z-loss and a reuse loss, averaged over layers.

    A router's own penalty, which it weighs itself, is added as it is.

    Args:
        stats: one per MoE layer, at least one.
        balance_weight: coefficient of the balance loss that the router names; 1 at its target.
        z_weight: coefficient of `z_loss`, in 1 / nats^2.
        reuse_loss: a key of `REUSE_LOSSES`.
        reuse_weight: coefficient of that loss.
    """
    per_layer = []
    for layer in stats:
        loss = balance_weight * BALANCE_LOSSES[layer.balance_loss](layer) + z_weight * z_loss(layer)
        if reuse_weight:
            loss = loss + reuse_weight * REUSE_LOSSES[reuse_loss](layer)
        per_layer.append(loss if layer.penalty_T is None else loss + mean_over_tokens(layer.penalty_T))
    return torch.stack(per_layer).mean()


def scheduled_weight(weight: float, schedule: Sequence[Sequence[float]] | None, step: int) -> float:
    """The coefficient at an optimiser step: `weight`, then that of the last (from_step, weight) pair reached.

    AdaMoE goes from tight to loose with one such pair. Source: Zeng et al. 2024, arXiv:2406.13233, section 3.3.
    """
    for from_step, later_weight in schedule or ():
        if step >= from_step:
            weight = later_weight
    return weight


def _share(count_R: Tensor, like: Tensor) -> Tensor:
    """Shares in the precision of the probabilities that they weigh: integer division alone would be float32."""
    return count_R.to(like.dtype) / count_R.sum().clamp_min(1)


def _dot(share_R: Tensor, probability_R: Tensor, target_share_R: Tensor | None) -> Tensor:
    if target_share_R is None:
        return len(share_R) * (share_R * probability_R).sum()
    return (share_R * probability_R / target_share_R.to(probability_R.dtype)).sum()
