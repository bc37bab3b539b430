"""A first plan within a few milliseconds: copies by a threshold, dealt in rounds, the heaviest to the emptiest.

All layers and GPUs of a round advance in one operation. A round gives each GPU one copy, so the deal is LPT's with a
lock on GPUs that have had one; on DeepSeek-R1 loads it is as balanced as EPLB. Without copies it is EPLB.
Source: rounds instead of single steps as in the evolved EPLB of ADRS (arXiv:2510.06189); written anew.
Shapes: L layers, E experts, G GPUs, P slots, S slots per GPU.
"""

import numpy as np
from numpy.typing import NDArray

from .eplb import eplb

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
HALVINGS = 12  # of the interval of the largest load per copy: 1 part in 4,096; leftover slots go to the hottest


def first_LP(load_LE: Float, slots: int, gpus: int) -> Integer:
    """Map of all layers, GPU by GPU; GPUs count as equal, and may get two copies of an expert, as EPLB's do.

    Args:
        load_LE: loads, not negative.
        slots: P, a multiple of `gpus` between E and E * gpus.
        gpus: G, at least 1.
    """
    L, E = load_LE.shape
    if slots == E:  # rounds suit the many small copies of replicated experts; else a GPU must be able to wait
        return eplb(load_LE, slots, 1, 1, gpus)
    count_LE = threshold_counts_LE(load_LE, slots, gpus)
    copy_LP = np.repeat(np.tile(np.arange(E), L), count_LE.ravel()).reshape(L, slots)
    weight_LP = np.take_along_axis(load_LE / count_LE, copy_LP, axis=1)
    order_LP = np.argsort(-weight_LP, axis=1, kind="stable")
    copy_LP = np.take_along_axis(copy_LP, order_LP, axis=1)
    weight_LP = np.take_along_axis(weight_LP, order_LP, axis=1)
    load_LG, map_LGS = np.zeros((L, gpus)), np.empty((L, gpus, slots // gpus), np.int64)
    row_L1 = np.arange(L)[:, None]
    for turn in range(slots // gpus):
        part = slice(turn * gpus, (turn + 1) * gpus)
        emptiest_LG = np.argsort(load_LG, axis=1, kind="stable")
        map_LGS[row_L1, emptiest_LG, turn] = copy_LP[:, part]
        load_LG[row_L1, emptiest_LG] += weight_LP[:, part]
    return map_LGS.reshape(L, slots)


def threshold_counts_LE(load_LE: Float, slots: int, gpus: int) -> Integer:
    """Copies of each expert so that no copy is heavier than nearly the least possible threshold, P in all.

    Args:
        load_LE: loads, not negative.
        slots: P, between E and E * gpus.
        gpus: at most so many copies of one expert.
    """
    L, E = load_LE.shape
    if slots == E:
        return np.ones((L, E), np.int64)
    high_L: Float = np.maximum(load_LE.max(axis=1), 1e-300)
    low_L: Float = high_L / gpus
    for _ in range(HALVINGS):
        middle_L: Float = (low_L + high_L) / 2
        is_enough_L = np.maximum(np.ceil(load_LE / middle_L[:, None]), 1).sum(axis=1) <= slots
        low_L = np.where(is_enough_L, low_L, middle_L)
        high_L = np.where(is_enough_L, middle_L, high_L)
    count_LE = np.clip(np.ceil(load_LE / high_L[:, None]), 1, gpus).astype(np.int64)
    left_L = slots - count_LE.sum(axis=1)
    while np.any(left_L > 0):
        order_LE = np.argsort(-np.where(count_LE < gpus, load_LE / count_LE, -1), axis=1, kind="stable")
        rank_LE = np.argsort(order_LE, axis=1)
        count_LE += (rank_LE < left_L[:, None]) & (count_LE < gpus)
        left_L = slots - count_LE.sum(axis=1)
    return count_LE
