"""Losses that keep routers balanced and their logits small, from the raw statistics that routers return.

Conventions, pinned here for the whole project: one loss per layer, averaged over layers (never pooled, a pooled loss
hides a collapsed layer); the load shares sum to 1, so the balance loss is 1 at uniform routing whatever K is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .router import RouterStats


def switch_balance_loss(stats: RouterStats) -> Tensor:
    """R times the dot product of load shares and mean probabilities; 1 when both are uniform.

    Source: Fedus et al. 2022 (Switch), arXiv:2101.03961, eq. 4, with shares of all K choices.
    """
    share_R = stats.count_R / stats.count_R.sum().clamp_min(1)
    return share_R.numel() * (share_R * stats.probability_R).sum()


def z_loss(stats: RouterStats) -> Tensor:
    """Mean squared log-partition of the router logits. Source: Zoph et al. 2022 (ST-MoE), arXiv:2202.08906, eq. 5."""
    return stats.logsumexp_T.square().mean()


def auxiliary_loss(stats: Sequence[RouterStats], *, balance_weight: float, z_weight: float) -> Tensor:
    """The weighted sum of both losses, averaged over layers.

    Args:
        stats: one per MoE layer, at least one.
        balance_weight: coefficient of `switch_balance_loss`.
        z_weight: coefficient of `z_loss`.
    """
    per_layer = [balance_weight * switch_balance_loss(layer) + z_weight * z_loss(layer) for layer in stats]
    return torch.stack(per_layer).mean()
