"""Churn: what it costs to go from one plan to another.

Shapes: L layers, E experts, G GPUs.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import Plan
from ..contract.problem import Problem


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
    size = expert_bytes if expert_bytes is not None else _expert_bytes(target)
    new_LEG = _new_copies_LEG(current, target)
    per_gpu_G = new_LEG.sum(axis=(0, 1)) * size
    seconds = float((per_gpu_G / target.cluster.nic_bytes_per_s_G).max())
    return Churn(int(new_LEG.sum()), float(new_LEG.sum() * size), seconds)


def moved_bytes_L(current: Plan, target: Plan) -> NDArray[np.float64]:
    """Bytes that GPUs must receive in each layer; raises as `churn` does."""
    return np.asarray(_new_copies_LEG(current, target).sum(axis=(1, 2)) * _expert_bytes(target))


def _expert_bytes(plan: Plan) -> float:
    size = plan.cluster.model.bytes_per_expert
    if size is None:
        raise ValueError("churn needs model.expert_bytes in the cluster file, or model.hidden and moe_intermediate")
    return size


def _new_copies_LEG(current: Plan, target: Plan) -> NDArray[np.bool_]:
    require_same_model(current, target)
    G = target.cluster.num_gpus
    before_LEG = np.zeros((target.num_layers, target.num_experts, G), bool)
    shared = min(G, current.cluster.num_gpus)
    before_LEG[:, :, :shared] = current.copies_LEG[:, :, :shared] > 0
    return (target.copies_LEG > 0) & ~before_LEG


def require_same_model(current: Plan, target: Plan | Problem) -> None:
    """Raise ValueError unless both place the same experts of the same layers."""
    if (current.layer_ids, current.num_experts) != (target.layer_ids, target.num_experts):
        raise ValueError(
            f"the plans are of different models: {len(current.layer_ids)} layers x {current.num_experts} experts and "
            f"{len(target.layer_ids)} x {target.num_experts}"
        )
