"""How many copies each expert gets.

Shapes: W scenarios, L layers, E experts, G GPUs, P slots of a layer.
"""

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Integer = NDArray[np.int64]


def replicate_LE(weight_WLE: Float, slots: int, gpus: int) -> Integer:
    """Copies of each expert that minimise the largest load per copy in any scenario, at most one copy per GPU.

    Greedy is optimal for this criterion (each extra slot to the largest load per copy).

    Args:
        weight_WLE: loads, every scenario on the same scale.
        slots: P, between E and E * gpus.
        gpus: G: at most so many copies of one expert.
    """
    peak_LE = weight_WLE.max(axis=0)
    L, E = peak_LE.shape
    count_LE = np.ones((L, E), np.int64)
    per_copy_LE = peak_LE.copy()
    row = np.arange(L)
    if gpus == 1:
        per_copy_LE[:] = -np.inf
    for _ in range(slots - E):
        chosen_L = per_copy_LE.argmax(axis=1)
        count_L = count_LE[row, chosen_L] + 1
        count_LE[row, chosen_L] = count_L
        per_copy_LE[row, chosen_L] = np.where(count_L < gpus, peak_LE[row, chosen_L] / count_L, -np.inf)
    return count_LE


def slots_of(count_LE: Integer) -> Integer:
    """[L, P]: each expert repeated as often as it has copies."""
    L, E = count_LE.shape
    return np.repeat(np.tile(np.arange(E), L), count_LE.ravel()).reshape(L, -1)


def counts_of(expert_LP: Integer, num_experts: int) -> Integer:
    """[L, E] copies of each expert in a map."""
    L = len(expert_LP)
    flat = expert_LP + np.arange(L)[:, None] * num_experts
    return np.bincount(flat.ravel(), minlength=L * num_experts).reshape(L, num_experts)
