"""What a routing trace says about balance: how often each expert is used, and how evenly.

Shapes: T tokens, L MoE layers, K experts per token, E experts.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .routing_trace import RoutingTrace

Float = NDArray[np.float64]
Integer = NDArray[np.int64]


def load_LE(trace: RoutingTrace) -> Integer:
    """Tokens routed to each expert of each layer; empty slots do not count."""
    E = trace.num_experts
    return np.stack([_count(trace.expert_TLK[:, layer], E) for layer in range(trace.num_layers)])


def skew_L(load: NDArray[Any]) -> Float:
    """Largest load over mean load per layer: 1 is perfect balance, E is total collapse (MaxVio + 1).

    Args:
        load: [L, E] tokens per expert.
    """
    mean_L = load.mean(axis=1)
    return np.divide(load.max(axis=1), mean_L, out=np.ones_like(mean_L), where=mean_L > 0)


def entropy_L(load: NDArray[Any]) -> Float:
    """Entropy of the load distribution per layer as a share of log E: 1 is uniform, 0 is a single expert.

    Args:
        load: [L, E] tokens per expert.
    """
    total_L1 = load.sum(axis=1, keepdims=True)
    share_LE = np.divide(load, total_L1, out=np.zeros(load.shape), where=total_L1 > 0)
    log_share_LE = np.log(share_LE, out=np.zeros_like(share_LE), where=share_LE > 0)
    return np.abs(share_LE * log_share_LE).sum(axis=1) / np.log(max(load.shape[1], 2))


def _count(expert_ids: NDArray[np.int16], num_experts: int) -> Integer:
    return np.bincount(expert_ids[expert_ids >= 0], minlength=num_experts)
