"""LPT: heaviest copy first, each to the GPU that it leaves least full, never two copies of an expert on one GPU.

Shapes: W scenarios, L layers, E experts, G GPUs, P slots of a layer. All layers advance together.
"""

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Integer = NDArray[np.int64]


def lpt_LP(weight_WLE: Float, expert_LP: Integer, speed_G: Float) -> Integer:
    """Deal the copies in `expert_LP` (any order) to GPUs.

    Args:
        weight_WLE: load of one copy of each expert, every scenario on the same scale.
        expert_LP: the expert of each copy, P of them per layer; P is a multiple of G.
        speed_G: relative speed of each GPU.

    Returns:
        physical_to_logical_LP, GPU by GPU. If the last free slots only fit a second copy of an expert on its GPU,
        that is mended by an exchange with another GPU.
    """
    W, L, _ = weight_WLE.shape
    P, G = expert_LP.shape[1], len(speed_G)
    per_gpu = P // G
    copy_WLP = np.take_along_axis(weight_WLE, np.broadcast_to(expert_LP, (W, L, P)), axis=2)
    order_LP = np.argsort(-copy_WLP.max(axis=0), axis=1, kind="stable")
    expert_LP = np.take_along_axis(expert_LP, order_LP, axis=1)
    copy_WLP = np.take_along_axis(copy_WLP, np.broadcast_to(order_LP, (W, L, P)), axis=2)
    load_WLG = np.zeros((W, L, G))
    full_LG = np.zeros((L, G))
    used_LG = np.zeros((L, G), np.int64)
    last_LE = np.zeros((L, weight_WLE.shape[2], G), bool) if weight_WLE.shape[2] < P else None
    placed_LP = np.empty((L, P), np.int64)
    row = np.arange(L)
    for step in range(P):
        expert_L = expert_LP[:, step]
        level_LG = ((load_WLG + copy_WLP[:, :, step, None]) / speed_G).max(axis=0) + full_LG
        if last_LE is not None:
            level_LG += last_LE[row, expert_L] * 1e6
        gpu_L = level_LG.argmin(axis=1)
        if last_LE is not None:
            last_LE[row, expert_L, gpu_L] = True
        placed_LP[row, gpu_L * per_gpu + used_LG[row, gpu_L]] = expert_L
        used_LG[row, gpu_L] += 1
        load_WLG[:, row, gpu_L] += copy_WLP[:, :, step]
        full_LG[row, gpu_L] = np.where(used_LG[row, gpu_L] == per_gpu, np.inf, 0.0)
    return separate_copies(placed_LP, G) if last_LE is not None else placed_LP


def separate_copies(expert_LP: Integer, gpus: int) -> Integer:
    """Exchange slots until no GPU holds two copies of one expert, where at most G copies of each exist."""
    result_LP = expert_LP.copy()
    per_gpu = expert_LP.shape[1] // gpus
    by_gpu = np.sort(result_LP.reshape(len(result_LP), gpus, per_gpu), axis=2)
    for layer in np.flatnonzero((by_gpu[:, :, 1:] == by_gpu[:, :, :-1]).any(axis=(1, 2))).tolist():
        _separate_layer(result_LP[layer].reshape(gpus, per_gpu))
    return result_LP


def _separate_layer(slot_GS: Integer) -> None:
    for gpu in range(len(slot_GS)):
        for slot in range(slot_GS.shape[1]):
            expert = slot_GS[gpu, slot]
            while (slot_GS[gpu] == expert).sum() > 1:
                other, place = _exchange_partner(slot_GS, gpu, int(expert))
                slot_GS[gpu, slot], slot_GS[other, place] = slot_GS[other, place], expert
                expert = slot_GS[gpu, slot]


def _exchange_partner(slot_GS: Integer, gpu: int, expert: int) -> tuple[int, int]:
    """A slot of a GPU without `expert` whose own expert `gpu` lacks; there is one while copies number at most G."""
    lacks_G = ~(slot_GS == expert).any(axis=1)
    allowed_GS = lacks_G[:, None] & ~np.isin(slot_GS, slot_GS[gpu])
    if not allowed_GS.any():
        raise ValueError(f"the copies of expert {expert} cannot be spread over {len(slot_GS)} GPUs")
    other, place = np.unravel_index(int(allowed_GS.argmax()), allowed_GS.shape)
    return int(other), int(place)
