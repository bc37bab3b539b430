"""Churn: what it costs to go from one plan to another.

Shapes: L layers, E experts, G GPUs.
"""

from dataclasses import dataclass

import numpy as np

from ..plan import Plan


@dataclass(frozen=True)
class Churn:
    """Expert copies that GPUs must receive, their bytes, and the seconds of the busiest GPU's link."""

    moved_copies: int
    moved_bytes: float
    seconds: float


def churn(current: Plan, target: Plan, expert_bytes: float | None = None) -> Churn:
    """Copies that `target` has on a GPU where `current` has none; GPUs are matched by rank.

    Args:
        current, target: plans of the same model; the number of GPUs may differ.
        expert_bytes: bytes of one expert of one layer; None takes the cluster file's.

    Raises:
        ValueError: if the plans are of different models, or no size is known.
    """
    size = expert_bytes if expert_bytes is not None else target.cluster.model.expert_bytes
    if size is None:
        raise ValueError("churn needs model.expert_bytes in the cluster file")
    require_same_model(current, target)
    G = target.cluster.num_gpus
    before = np.zeros((target.num_layers, target.num_experts, G), bool)
    shared = min(G, current.cluster.num_gpus)
    before[:, :, :shared] = current.copies_LEG[:, :, :shared] > 0
    new_LEG = (target.copies_LEG > 0) & ~before
    per_gpu_G = new_LEG.sum(axis=(0, 1)) * size
    seconds = float((per_gpu_G / target.cluster.nic_bytes_per_s_G).max())
    return Churn(int(new_LEG.sum()), float(new_LEG.sum() * size), seconds)


def require_same_model(current: Plan, target: Plan) -> None:
    """Raise ValueError unless both plans place the same experts of the same layers."""
    if (current.layer_ids, current.num_experts) != (target.layer_ids, target.num_experts):
        raise ValueError(
            f"the plans are of different models: {len(current.layer_ids)} layers x {current.num_experts} experts and "
            f"{len(target.layer_ids)} x {target.num_experts}"
        )
