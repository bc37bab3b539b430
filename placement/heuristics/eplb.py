"""EPLB, vectorised over layers: the same plans as `eplb_reference.py`, some hundred times faster.

Rows: any number of independent problems (layers, or layers x nodes); P slots, E experts, G GPUs.
Source: github.com/deepseek-ai/EPLB (MIT).
"""

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Integer = NDArray[np.int64]


def balanced_packing(weight_RN: Float, packs: int) -> tuple[Integer, Integer]:
    """Pack the N items of each row into packs of N / packs items, heaviest first into the lightest pack with room.

    Returns:
        [R, N] pack of each item and its rank within the pack.
    """
    rows, items = weight_RN.shape
    per_pack = items // packs
    if per_pack == 1:
        return np.tile(np.arange(items), (rows, 1)), np.zeros((rows, items), np.int64)
    order_NR = np.argsort(-weight_RN, axis=1, kind="stable").T.copy()
    sorted_NR = np.take_along_axis(weight_RN.T, order_NR, axis=0)
    flat_NR = np.empty((items, rows), np.int64)
    row_start = np.arange(rows) * packs
    load = np.zeros(rows * packs)
    by_row = load.reshape(rows, packs)
    room = np.full(rows * packs, per_pack)
    for step in range(items):
        flat = by_row.argmin(axis=1)
        flat += row_start
        flat_NR[step] = flat
        load[flat] += sorted_NR[step]
        room[flat] -= 1
        if step >= per_pack - 1:
            load[flat[room[flat] == 0]] = np.inf
    rank_NR = _ranks(flat_NR, rows * packs)
    pack_RN, rank_RN = np.empty((2, rows, items), np.int64)
    np.put_along_axis(pack_RN, order_NR.T, (flat_NR - row_start).T, axis=1)
    np.put_along_axis(rank_RN, order_NR.T, rank_NR.T, axis=1)
    return pack_RN, rank_RN


def replicate_experts(weight_RE: Float, slots: int) -> tuple[Integer, Integer]:
    """Give each slot beyond one per expert to the expert with the largest load per copy.

    Returns:
        [R, slots] expert of each slot, [R, E] copies of each expert.
    """
    rows, experts = weight_RE.shape
    slot_expert = np.empty((rows, slots), np.int64)
    slot_expert[:, :experts] = np.arange(experts)
    count = np.ones((rows, experts), np.int64)
    per_copy = weight_RE.copy()
    row = np.arange(rows)
    for slot in range(experts, slots):
        chosen = per_copy.argmax(axis=1)
        slot_expert[:, slot] = chosen
        count[row, chosen] += 1
        per_copy[row, chosen] = weight_RE[row, chosen] / count[row, chosen]
    return slot_expert, count


def eplb(weight_LE: Float, slots: int, groups: int, nodes: int, gpus: int) -> Integer:
    """`rebalance_experts` of DeepSeek's EPLB: hierarchical if the groups divide over the nodes, else global.

    Args:
        weight_LE: load of each expert.
        slots: P, a multiple of `gpus`.
        groups, nodes, gpus: expert groups of the router, nodes, GPUs; `gpus` is a multiple of `nodes`.

    Returns:
        physical_to_logical_LP.
    """
    L, E = weight_LE.shape
    if slots % gpus or gpus % nodes or E % groups:
        raise ValueError(
            f"EPLB needs slots % gpus == 0, gpus % nodes == 0 and experts % groups == 0; "
            f"got {slots} slots, {gpus} GPUs, {nodes} nodes, {E} experts, {groups} groups"
        )
    if groups % nodes:
        groups, nodes = 1, 1
    reordered_LE = _pack_groups(weight_LE, groups, nodes)
    member = reordered_LE.reshape(L * nodes, E // nodes)
    local = np.take_along_axis(weight_LE, reordered_LE, axis=1).reshape(L * nodes, E // nodes)
    slot_expert, count = replicate_experts(local, slots // nodes)
    slot_load = np.take_along_axis(local / count, slot_expert, axis=1)
    pack, rank = balanced_packing(slot_load, gpus // nodes)
    ordered = np.empty_like(slot_expert)
    np.put_along_axis(ordered, pack * (slots // gpus) + rank, slot_expert, axis=1)
    return np.take_along_axis(member, ordered, axis=1).reshape(L, slots)


def _pack_groups(weight_LE: Float, groups: int, nodes: int) -> Integer:
    """Experts reordered so that node n owns the n-th part of each row."""
    L, E = weight_LE.shape
    size = E // groups
    if groups == 1:
        return np.tile(np.arange(E), (L, 1))
    node, rank = balanced_packing(weight_LE.reshape(L, groups, size).sum(axis=2), nodes)
    start = ((node * (groups // nodes) + rank) * size)[:, :, None] + np.arange(size)
    reordered = np.empty((L, E), np.int64)
    np.put_along_axis(reordered, start.reshape(L, E), np.tile(np.arange(E), (L, 1)), axis=1)
    return reordered


def _ranks(flat_NR: Integer, bins: int) -> Integer:
    """How many earlier items of the same column went to the same bin (bins of different columns differ)."""
    flat = flat_NR.ravel()
    order = np.argsort(flat, kind="stable")
    start = np.searchsorted(flat[order], np.arange(bins))
    rank = np.empty(len(flat), np.int64)
    rank[order] = np.arange(len(flat)) - start[flat[order]]
    return rank.reshape(flat_NR.shape)
