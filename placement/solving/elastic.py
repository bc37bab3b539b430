"""Elastic re-planning: from a running plan to another one, with few bytes moved and every expert always live.

1. GPUs of the new plan are matched, within nodes, to the old ones so that most copies stay (assignment problem).
2. The transfers are ordered: a copy is only dropped when another copy of that expert is live, or is received first into
   spare room. Each step is one layer of one GPU, so spare memory is small and is reported.
Source: the aims are ElasticMoE's (arXiv:2510.02613). Shapes: L layers, E experts, G GPUs, P slots.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import Plan
from ..objectives.churn import require_same_model

Integer = NDArray[np.int64]


@dataclass(frozen=True)
class Transfer:
    """One expert's weights of one layer from a GPU that holds them to one that needs them."""

    layer: int
    expert: int
    source: int
    target: int
    crosses_nodes: bool


@dataclass(frozen=True)
class Drop:
    """A copy that is freed; at that moment another copy of the expert is live."""

    layer: int
    expert: int
    gpu: int


@dataclass(frozen=True, kw_only=True)
class Migration:
    """The way from one plan to another.

    Args:
        plan: the target, its GPUs renumbered to keep most copies in place.
        steps: transfers and drops in order.
        moved_bytes, node_crossing_bytes: of all transfers, and of those between nodes; copies if no size is known.
        peak_extra_bytes: largest memory above max(old, new) slots, spare ones counted, that any GPU needs at a time.
    """

    plan: Plan
    steps: list[Transfer | Drop]
    moved_bytes: float
    node_crossing_bytes: float
    peak_extra_bytes: float

    def to_json(self) -> dict[str, Any]:
        totals = {name: getattr(self, name) for name in ("moved_bytes", "node_crossing_bytes", "peak_extra_bytes")}
        return {**totals, "steps": [{"kind": type(step).__name__.lower(), **vars(step)} for step in self.steps]}


def migrate(current: Plan, target: Plan, expert_bytes: float | None = None) -> Migration:
    """Order the way from `current` to `target`, which may have more or fewer GPUs.

    Args:
        current: what runs now; its GPUs beyond the target's are given up, new ones join at the end.
        target: the plan to end at, up to the numbering of its GPUs.
        expert_bytes: bytes of one expert of one layer; None takes the cluster file's, else 1: copies.

    Raises:
        ValueError: if the plans are of different models.
    """
    require_same_model(current, target)
    if current.homes is not None or target.homes is not None:
        raise ValueError("transfers are ordered between plans that keep every expert on GPUs; a plan here has tiers")
    size = expert_bytes if expert_bytes is not None else target.cluster.model.bytes_per_expert or 1.0
    renumbered = match_gpus(current, target)
    steps: list[Transfer | Drop] = []
    peak = 0
    for layer in range(target.num_layers):
        found, extra = _order_layer(current, renumbered, layer)
        steps += found
        peak = max(peak, extra)
    moves = [step for step in steps if isinstance(step, Transfer)]
    return Migration(
        plan=renumbered,
        steps=steps,
        moved_bytes=len(moves) * size,
        node_crossing_bytes=sum(step.crosses_nodes for step in moves) * size,
        peak_extra_bytes=peak * size,
    )


def migrate_checked(current: Plan, target: Plan, expert_bytes: float | None = None) -> Migration:
    """`migrate`, carried out on paper before anybody carries it out: every expert has a live copy at every step.

    Args:
        current, target, expert_bytes: as for `migrate`.

    Raises:
        ValueError: if the plans are of different models.
        RuntimeError: if a step cannot be carried out.
    """
    migration = migrate(current, target, expert_bytes)
    for _ in replay(current, migration):
        pass
    return migration


def match_gpus(current: Plan, target: Plan) -> Plan:
    """Renumber nodes, and GPUs within nodes, of `target` so that most copies are where they are now.

    Only alike machines change places: equal nodes, and equal speeds within a node.
    """
    from scipy.optimize import linear_sum_assignment

    G, M = target.cluster.num_gpus, target.cluster.num_nodes
    size = target.cluster.gpus_per_node
    if size is None or np.any(target.cluster.speed_G != target.cluster.speed_G[0]):
        return target
    have = np.zeros((G, target.num_layers * target.num_experts), np.float32)
    shared = min(G, current.cluster.num_gpus)
    flat = (current.copies_LEG > 0).reshape(-1, current.cluster.num_gpus).T
    have[:shared] = flat[:shared]
    want = (target.copies_LEG > 0).reshape(-1, G).T.astype(np.float32)
    overlap_GG = have @ want.T
    kept_MM, inner = np.zeros((M, M)), {}
    for here in range(M):
        for there in range(M):
            block = overlap_GG[here * size : (here + 1) * size, there * size : (there + 1) * size]
            _, chosen = linear_sum_assignment(-block)
            inner[here, there] = chosen
            kept_MM[here, there] = block[np.arange(size), chosen].sum()
    _, node_of = linear_sum_assignment(-kept_MM)
    source_G = np.concatenate([node_of[m] * size + inner[m, int(node_of[m])] for m in range(M)])
    slots = target.physical_to_logical_LP.reshape(target.num_layers, G, -1)[:, source_G]
    return replace(target, physical_to_logical_LP=slots.reshape(target.num_layers, -1))


def replay(current: Plan, migration: Migration) -> Iterator[tuple[Transfer | Drop, int]]:
    """Carry out the steps on paper; yields each with the number of live copies that its expert then has.

    Raises:
        RuntimeError: if a source does not hold what it shall send, or an expert would have no live copy.
    """
    live = {(layer, expert, gpu) for layer, expert, gpu in np.argwhere(current.copies_LEG > 0).tolist()}
    count = (current.copies_LEG > 0).sum(axis=2)
    for step in migration.steps:
        gpu = step.target if isinstance(step, Transfer) else step.gpu
        if isinstance(step, Transfer):
            if (step.layer, step.expert, step.source) not in live:
                raise RuntimeError(f"{step}: the source does not hold the expert")
            live.add((step.layer, step.expert, gpu))
            count[step.layer, step.expert] += 1
        else:
            live.remove((step.layer, step.expert, gpu))
            count[step.layer, step.expert] -= 1
        if count[step.layer, step.expert] < 1:
            raise RuntimeError(f"{step}: the expert has no live copy")
        yield step, int(count[step.layer, step.expert])
    wanted = {(layer, expert, gpu) for layer, expert, gpu in np.argwhere(migration.plan.copies_LEG > 0).tolist()}
    if live != wanted:
        raise RuntimeError("the steps do not end at the target plan")


def _order_layer(current: Plan, target: Plan, layer: int) -> tuple[list[Transfer | Drop], int]:
    """Steps of one layer: free what is doubly live, receive, and so on; spare slots only when nothing else goes."""
    holds = [set(np.flatnonzero(row).tolist()) for row in (current.copies_LEG[layer] > 0).T]
    holds += [set() for _ in range(target.cluster.num_gpus - len(holds))]
    wants = [set(np.flatnonzero(row).tolist()) for row in (target.copies_LEG[layer] > 0).T]
    wants += [set() for _ in range(len(holds) - len(wants))]
    room = [_room(current, target)] * len(holds)
    node_of = _node_of(current, target, len(holds))
    copies = {expert: sum(expert in held for held in holds) for expert in range(target.num_experts)}
    steps: list[Transfer | Drop] = []
    peak = 0
    missing = [(gpu, expert) for gpu, want in enumerate(wants) for expert in sorted(want - holds[gpu])]
    while missing:
        for gpu, held in enumerate(holds):
            _free(layer, gpu, held, wants[gpu], copies, steps)
        ready = [pair for pair in missing if len(holds[pair[0]]) < room[pair[0]]] or missing[:1]
        for gpu, expert in ready:
            if len(holds[gpu]) >= room[gpu] and (gpu, expert) != ready[0]:
                continue
            source = _nearest(gpu, expert, holds, node_of)
            steps.append(Transfer(layer, expert, source, gpu, bool(node_of[source] != node_of[gpu])))
            holds[gpu].add(expert)
            copies[expert] += 1
            peak = max(peak, len(holds[gpu]) - room[gpu])
            missing.remove((gpu, expert))
    for gpu, held in enumerate(holds):
        _free(layer, gpu, held, wants[gpu], copies, steps)
    return steps, peak


def _room(current: Plan, target: Plan) -> int:
    """Copies of a layer that a GPU may hold on the way: slots of either plan, with those that it leaves free."""
    return max(plan.slots_per_gpu + plan.cluster.ep.spare_slots for plan in (current, target))


def _free(
    layer: int, gpu: int, held: set[int], want: set[int], copies: dict[int, int], steps: list[Transfer | Drop]
) -> None:
    for expert in sorted(held - want):
        if copies[expert] > 1:
            held.remove(expert)
            copies[expert] -= 1
            steps.append(Drop(layer, expert, gpu))


def _nearest(gpu: int, expert: int, holds: list[set[int]], node_of: Integer) -> int:
    sources = [other for other, held in enumerate(holds) if expert in held]
    return min(sources, key=lambda other: (bool(node_of[other] != node_of[gpu]), other))


def _node_of(current: Plan, target: Plan, gpus: int) -> Integer:
    larger = current.cluster if current.cluster.num_gpus >= target.cluster.num_gpus else target.cluster
    return larger.node_G[:gpus]
