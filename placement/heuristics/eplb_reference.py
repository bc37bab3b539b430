"""EPLB exactly as DeepSeek published it, in plain Python loops: the ground truth for `eplb.py`.

Ties between equal loads are broken by the lower index (the published code leaves them to an unstable sort).
Source: github.com/deepseek-ai/EPLB, eplb.py at d52c72d (MIT).
"""

Row = list[float]


def balanced_packing_reference(weights: Row, packs: int) -> tuple[list[int], list[int]]:
    """Pack n weights into `packs` packs of n / packs items each, heaviest first into the lightest pack with room.

    Returns:
        The pack of each item and its rank within the pack.
    """
    per_pack = len(weights) // packs
    if per_pack == 1:
        return list(range(len(weights))), [0] * len(weights)
    pack_of, rank_of = [-1] * len(weights), [-1] * len(weights)
    pack_weights, pack_items = [0.0] * packs, [0] * packs
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        pack = min((p for p in range(packs) if pack_items[p] < per_pack), key=pack_weights.__getitem__)
        pack_of[item], rank_of[item] = pack, pack_items[pack]
        pack_weights[pack] += weights[item]
        pack_items[pack] += 1
    return pack_of, rank_of


def replicate_experts_reference(weights: Row, slots: int) -> tuple[list[int], list[int]]:
    """Give each further slot to the expert with the largest load per copy.

    Returns:
        The expert of each slot and the number of copies of each expert.
    """
    slot_expert, count = list(range(len(weights))), [1] * len(weights)
    for _ in range(len(weights), slots):
        chosen = max(range(len(weights)), key=lambda e: (weights[e] / count[e], -e))
        slot_expert.append(chosen)
        count[chosen] += 1
    return slot_expert, count


def eplb_layer_reference(weights: Row, slots: int, groups: int, nodes: int, gpus: int) -> list[int]:
    """One layer of `rebalance_experts`: hierarchical if the groups divide over the nodes, else global."""
    if groups % nodes:
        groups, nodes = 1, 1
    experts, group_size = len(weights), len(weights) // groups
    group_loads = [sum(weights[g * group_size : (g + 1) * group_size]) for g in range(groups)]
    node_of, rank_of = balanced_packing_reference(group_loads, nodes)
    reordered = [0] * experts
    for g in range(groups):
        start = (node_of[g] * (groups // nodes) + rank_of[g]) * group_size
        reordered[start : start + group_size] = range(g * group_size, (g + 1) * group_size)
    result: list[int] = []
    per_node = experts // nodes
    for node in range(nodes):
        members = reordered[node * per_node : (node + 1) * per_node]
        local = [weights[e] for e in members]
        slot_expert, count = replicate_experts_reference(local, slots // nodes)
        slot_loads = [local[e] / count[e] for e in slot_expert]
        gpu_of, place_of = balanced_packing_reference(slot_loads, gpus // nodes)
        ordered = [0] * len(slot_expert)
        for slot, expert in enumerate(slot_expert):
            ordered[gpu_of[slot] * (slots // gpus) + place_of[slot]] = members[expert]
        result.extend(ordered)
    return result
