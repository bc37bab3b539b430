"""Activated experts: how many experts the busiest GPU has to read from memory for one decode batch.

In memory-bound decoding time follows the experts that are touched, not the tokens. An expert with share p of the
routed tokens is touched by a batch of B tokens, K experts each, with probability 1 - (1 - p)^(B K); a copy of r sees
p / r. Source: METRO, arXiv:2512.09277; independence between tokens assumed.
Shapes: L layers, E experts, G GPUs, P slots.
"""

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import Plan

Float = NDArray[np.float64]


def activation_weight_LE(load_LE: Float, replicas_LE: NDArray[np.int64], batch_routes: int) -> Float:
    """Probability that one copy of each expert is touched by a batch of `batch_routes` (tokens * K) routes."""
    total_L1 = load_LE.sum(axis=1, keepdims=True)
    share_LE = np.divide(load_LE, total_L1, out=np.zeros_like(load_LE), where=total_L1 > 0)
    per_copy_LE = share_LE / np.maximum(replicas_LE, 1)
    return np.asarray(-np.expm1(batch_routes * np.log1p(-np.minimum(per_copy_LE, 1 - 1e-15))))


def activated_L(plan: Plan, load_LE: Float, batch_routes: int) -> Float:
    """Expected activated experts of the busiest GPU, per layer."""
    weight_LE = activation_weight_LE(load_LE, plan.replicas_LE, batch_routes)
    slot_LP = np.take_along_axis(weight_LE, plan.physical_to_logical_LP, axis=1)
    per_gpu_LG = slot_LP.reshape(plan.num_layers, plan.cluster.num_gpus, -1).sum(axis=2)
    return np.asarray(per_gpu_LG.max(axis=1))
