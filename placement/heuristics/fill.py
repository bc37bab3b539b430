"""Copies into slots that a running plan leaves free: nothing moves away, so only these copies are sent.

Shapes: L layers, E experts, G GPUs, P slots.
"""

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Integer = NDArray[np.int64]


def fill_LP(running_LP: Integer, load_LE: Float, slots_per_gpu: int, speed_G: Float) -> Integer:
    """The running map with further copies, of what weighs most per copy, each on the GPU that has least to do.

    Args:
        running_LP: the expert in each slot of the running plan.
        load_LE: routed tokens.
        slots_per_gpu: of the new map, more than the running one has.
        speed_G: relative speed of each GPU.

    Raises:
        ValueError: if a GPU already holds every expert of a layer, so that nothing is left to add.
    """
    gpus, experts = len(speed_G), load_LE.shape[1]
    running_LGS = running_LP.reshape(len(running_LP), gpus, -1)
    more = slots_per_gpu - running_LGS.shape[2]
    added_LGS = np.zeros((len(running_LP), gpus, more), np.int64)
    for layer, slot_GS in enumerate(running_LGS):
        copies_EG = np.zeros((experts, gpus), np.int64)
        np.add.at(copies_EG, (slot_GS.ravel(), np.repeat(np.arange(gpus), slot_GS.shape[1])), 1)
        free_G = np.full(gpus, more)
        while free_G.any():
            expert, gpu = _next(copies_EG, load_LE[layer], free_G, speed_G)
            added_LGS[layer, gpu, more - free_G[gpu]] = expert
            copies_EG[expert, gpu] += 1
            free_G[gpu] -= 1
    return np.concatenate([running_LGS, added_LGS], axis=2).reshape(len(running_LP), -1)


def _next(copies_EG: Integer, load_E: Float, free_G: Integer, speed_G: Float) -> tuple[int, int]:
    """The expert of the largest load per copy that some GPU with room lacks, and the emptiest such GPU."""
    count_E = copies_EG.sum(axis=1)
    may_EG = (copies_EG == 0) & (free_G > 0)
    share_E = load_E / np.maximum(count_E, 1)
    expert = int(np.where(may_EG.any(axis=1), share_E, -1).argmax())
    if not may_EG[expert].any():
        raise ValueError("a GPU holds every expert of a layer and still has slots free; leave fewer slots free")
    busy_G = share_E @ copies_EG / speed_G
    return expert, int(np.where(may_EG[expert], busy_G, np.inf).argmin())
