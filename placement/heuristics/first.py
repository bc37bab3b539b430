"""A first plan within a few milliseconds: copies by a threshold, dealt in rounds, the heaviest to the emptiest.

All layers and GPUs of a round advance in one operation. A round gives each GPU one copy, so the deal is LPT's with a
lock on GPUs that have had one; on DeepSeek-R1 loads it is as balanced as EPLB. Without copies it is EPLB.
Every sort is of integers, a value's bits above its index: NumPy sorts those by vector instructions and keeps ties in
order, which it does not do for floats.
Source: rounds instead of single steps as in the evolved EPLB of ADRS (arXiv:2510.06189); written anew.
Shapes: L layers, E experts, G GPUs, P slots, S slots per GPU.
"""

import numpy as np
from numpy.typing import NDArray

from .eplb import eplb

Float = NDArray[np.float64]
Single = NDArray[np.float32]
Integer = NDArray[np.int64]
INDEX_BITS = 32  # of a sorted key, below the 32 bits of its value
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
    per_copy_LE = np.asarray(_shares_LE(load_LE) / count_LE, np.float32)
    weight_LE, expert_LE = _ranked(per_copy_LE, np.arange(E), falling=True)
    repeat_N = np.take_along_axis(count_LE, expert_LE, axis=1).ravel()
    turns = (L, slots // gpus, gpus)
    expert_LSG = np.repeat(expert_LE.ravel(), repeat_N).reshape(turns)
    weight_LSG = np.repeat(weight_LE.ravel(), repeat_N).reshape(turns)
    gpu_LSG = np.empty(turns, np.int64)
    load_LG, gpu_LG = np.zeros((L, gpus), np.float32), np.tile(np.arange(gpus), (L, 1))
    for turn in range(turns[1]):
        load_LG, gpu_LG = _ranked(load_LG, gpu_LG)
        gpu_LSG[:, turn] = gpu_LG
        load_LG = load_LG + weight_LSG[:, turn]
    map_LSG = np.empty(turns, np.int64)
    np.put_along_axis(map_LSG, gpu_LSG, expert_LSG, axis=2)
    return map_LSG.swapaxes(1, 2).reshape(L, slots)


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
    share_LE = _shares_LE(load_LE)
    low_L1, high_L1 = np.full((L, 1), 1 / gpus, np.float32), np.ones((L, 1), np.float32)
    needed_LE = np.empty_like(share_LE)

    def needed(threshold_L1: Single) -> Single:
        np.multiply(share_LE, 1 / threshold_L1, out=needed_LE)
        np.ceil(needed_LE, out=needed_LE)
        return np.clip(needed_LE, 1, gpus, out=needed_LE)

    for _ in range(HALVINGS):
        middle_L1 = np.asarray((low_L1 + high_L1) / 2, np.float32)
        is_enough_L1 = needed(middle_L1).sum(axis=1, keepdims=True) <= slots
        low_L1 = np.where(is_enough_L1, low_L1, middle_L1)
        high_L1 = np.where(is_enough_L1, middle_L1, high_L1)
    count_LE = needed(high_L1).astype(np.int64)
    left_L = slots - count_LE.sum(axis=1)
    while np.any(left_L > 0):
        worth_LE = np.asarray(np.where(count_LE < gpus, share_LE / count_LE, -1), np.float32)
        _, order_LE = _ranked(worth_LE, np.arange(E), falling=True)
        layer_N, rank_N = np.nonzero(np.arange(E) < left_L[:, None])
        expert_N = order_LE[layer_N, rank_N]
        count_LE[layer_N, expert_N] += count_LE[layer_N, expert_N] < gpus
        left_L = slots - count_LE.sum(axis=1)
    return count_LE


def _shares_LE(load_LE: Float) -> Single:
    """Loads over the layer's largest, at most 1."""
    largest_L1 = np.maximum(load_LE.max(axis=1, keepdims=True), 1e-300)
    return np.asarray(load_LE / largest_L1, np.float32)


def _ranked(value_LN: Single, id_LN: Integer, *, falling: bool = False) -> tuple[Single, Integer]:
    """Values of each row in order, and their ids; equal values by id.

    The bits of floats that are not negative rise with them; -1 comes last where values fall.
    """
    bits_LN = value_LN.view(np.int32).astype(np.int64)
    key_LN = np.sort((-bits_LN if falling else bits_LN) << INDEX_BITS | id_LN, axis=1)
    found_LN = key_LN >> INDEX_BITS
    value_LN = (-found_LN if falling else found_LN).astype(np.int32).view(np.float32)
    return value_LN, key_LN & ((1 << INDEX_BITS) - 1)
