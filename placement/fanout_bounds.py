"""Valid lower bounds on fan-out.

Shapes: L layers, T tokens, K experts per token, E experts, G GPUs, S slots per GPU.
"""

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace

from .objectives.registry import fanout_weights
from .plan import Plan

Float = NDArray[np.float64]


def fanout_bound_L(name: str, trace: RoutingTrace, plan: Plan) -> tuple[Float, str]:
    """Bound of `gpu-fanout`, `node-fanout` or their sum `fanout`, for any plan with as many slots."""
    gpu_slots = plan.slots_per_gpu
    node_slots = gpu_slots * int(np.bincount(plan.cluster.node_G).max())
    gpu_L, node_L = _capacity_bound_L(trace, gpu_slots), _capacity_bound_L(trace, node_slots)
    gpu_weight, node_weight = fanout_weights(plan.cluster)
    joined_L = gpu_weight * gpu_L + node_weight * node_L
    value_L = {"gpu-fanout": gpu_L, "node-fanout": node_L, "fanout": joined_L}[name]
    return value_L, "capacity"


def _capacity_bound_L(trace: RoutingTrace, slots: int) -> Float:
    """A token with n distinct experts needs at least n / S parts, rounded up."""
    ordered = np.sort(trace.expert_TLK, axis=2)
    is_new = ordered >= 0
    is_new[:, :, 1:] &= ordered[:, :, 1:] != ordered[:, :, :-1]
    distinct_TL = is_new.sum(axis=2)
    used_L = np.maximum((distinct_TL > 0).sum(axis=0), 1)
    return np.asarray((-(-distinct_TL // slots)).sum(axis=0) / used_L)
