"""Balance: how much fuller the fullest GPU is than the mean one.

Shapes: L layers, E experts, G GPUs.
"""

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import Plan
from .dispatch import share_EG

Float = NDArray[np.float64]


def gpu_load_LG(plan: Plan, load_LE: Float) -> Float:
    """Expected routed tokens of each GPU under the plan's dispatch policy."""
    copies_LEG = plan.copies_LEG
    if plan.dispatch == "uniform":
        return _uniform_load_LG(plan, load_LE)
    return np.stack(
        [
            load_LE[layer] @ share_EG(copies_LEG[layer], plan.cluster, plan.dispatch, load_LE[layer])
            for layer in range(plan.num_layers)
        ]
    )


def imbalance_L(plan: Plan, load_LE: Float) -> Float:
    """Fullest over mean GPU, load measured in time (tokens / speed); 1 is perfect, and the value of an empty layer."""
    speed_G = plan.cluster.speed_G
    load_LG = gpu_load_LG(plan, load_LE)
    mean_L = load_LG.sum(axis=1) / speed_G.sum()
    return np.divide((load_LG / speed_G).max(axis=1), mean_L, out=np.ones(len(mean_L)), where=mean_L > 0)


def imbalance(plan: Plan, load_LE: Float) -> float:
    """Mean over layers of `imbalance_L`: the balance objective, lower is better."""
    return float(imbalance_L(plan, load_LE).mean())


def balancedness(plan: Plan, load_LE: Float) -> float:
    """Mean over layers of mean / fullest GPU, as SGLang reports it; 1 is perfect."""
    return float((1 / imbalance_L(plan, load_LE)).mean())


def _uniform_load_LG(plan: Plan, load_LE: Float) -> Float:
    per_copy_LE = load_LE / np.maximum(plan.replicas_LE, 1)
    slot_load_LP = np.take_along_axis(per_copy_LE, plan.physical_to_logical_LP, axis=1)
    return slot_load_LP.reshape(plan.num_layers, plan.cluster.num_gpus, -1).sum(axis=2)
