"""A migration as exchanges: the smallest sets of slot changes between which every state is a whole plan.

A slot whose expert has another copy may change alone. Else the expert must go where it is wanted, what is there goes
on, and so forth until the circle closes: mostly a swap of two GPUs. Such changes are carried out together.
Exchanges that take most from the fullest GPUs per copy moved come first, so a migration that stops early has paid for
few moves. Shapes: L layers, E experts, G GPUs, P slots.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import Plan
from .elastic import Drop, Transfer

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
EPSILON = 1e-300  # a layer without load divides by it


class Change(NamedTuple):
    """One slot of a GPU that holds another expert afterwards."""

    layer: int
    gpu: int
    old: int
    new: int


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Slot changes of one layer that leave a whole plan.

    Args:
        changes: in order.
        steps: their transfers and drops; at most one GPU holds one expert more than its slots, until the last step.
        gain: what the layer's imbalance (fullest over mean GPU) falls by; 0 where loads are not known.
    """

    changes: list[Change]
    steps: list[Transfer | Drop]
    gain: float

    @property
    def moves(self) -> int:
        """Experts that are sent."""
        return sum(isinstance(step, Transfer) for step in self.steps)


def exchanges(current: Plan, target: Plan) -> list[Exchange]:
    """All changes from one plan to another, the most balance per copy moved first.

    Args:
        current: what runs now.
        target: as many GPUs and slots, numbered as they shall stay; its `metadata["load"]` are the loads, if known.

    Raises:
        ValueError: if GPUs or slots differ.
    """
    if current.cluster.num_gpus != target.cluster.num_gpus or current.num_slots != target.num_slots:
        raise ValueError(
            f"exchanges need equal GPUs and slots; got {current.cluster.num_gpus} x {current.slots_per_gpu} and "
            f"{target.cluster.num_gpus} x {target.slots_per_gpu}"
        )
    load = target.metadata.get("load")
    load_LE = np.ones((target.num_layers, target.num_experts)) if load is None else np.array(load, np.float64)
    runs: list[tuple[float, list[Exchange]]] = []
    for layer in range(target.num_layers):
        found = list(_Layer(current, target, layer, load_LE[layer]).exchanges())
        runs += _steepest_first([replace(one, gain=0.0) for one in found] if load is None else found)
    return [one for _, run in sorted(runs, key=lambda pair: -pair[0]) for one in run]


def plan_after(current: Plan, done: list[Exchange], target: Plan) -> Plan:
    """The plan that runs after some exchanges; it has no certificate."""
    map_LGS = current.physical_to_logical_LP.reshape(current.num_layers, current.cluster.num_gpus, -1).copy()
    for layer, gpu, old, new in (change for exchange in done for change in exchange.changes):
        slots = map_LGS[layer, gpu]
        slots[np.flatnonzero(slots == old)[0]] = new
    return replace(target, physical_to_logical_LP=map_LGS.reshape(current.num_layers, -1), certificate=None)


class _Layer:
    """One layer on its way: copies as they are, and what each GPU still has to give and to get."""

    def __init__(self, current: Plan, target: Plan, layer: int, load_E: Float) -> None:
        self.layer, self.load_E = layer, load_E
        self.copies_EG = current.copies_LEG[layer].astype(np.int64)
        self.missing_EG = target.copies_LEG[layer].astype(np.int64) - self.copies_EG
        self.speed_G, self.node_G = target.cluster.speed_G, target.cluster.node_G

    def exchanges(self) -> Iterator[Exchange]:
        before = self._busy_G().max()
        while (self.missing_EG < 0).any():
            changes = self._alone() or self._circle()
            steps = list(self._carry_out(changes))
            after = self._busy_G().max()
            yield Exchange(changes=changes, steps=steps, gain=float(before - after))
            before = after

    def _busy_G(self) -> Float:
        """Time of each GPU over that of the mean GPU."""
        share_E = self.load_E / np.maximum(self.copies_EG.sum(axis=1), 1)
        mean = max(float(self.load_E.sum() / self.speed_G.sum()), EPSILON)
        return np.asarray(share_E @ self.copies_EG / self.speed_G / mean)

    def _alone(self) -> list[Change]:
        """A change of the fullest GPU that can give away a copy of which another is live; none if there is no such."""
        free_EG = (self.missing_EG < 0) & (self.copies_EG.sum(axis=1) > 1)[:, None]
        if not free_EG.any():
            return []
        gpu = int(np.where(free_EG.any(axis=0), self._busy_G(), -1).argmax())
        share_E = self.load_E / np.maximum(self.copies_EG.sum(axis=1), 1)
        old = int(np.where(free_EG[:, gpu], share_E, -1).argmax())
        new = int(np.where(self.missing_EG[:, gpu] > 0, share_E, np.inf).argmin())
        return [Change(self.layer, gpu, old, new)]

    def _circle(self) -> list[Change]:
        """The shortest circle through the fullest GPU with changes left: each expert has one copy and goes on."""
        start = int(np.where((self.missing_EG < 0).any(axis=0), self._busy_G(), -1).argmax())
        came: dict[int, tuple[int, int]] = {}  # GPU -> who sends to it, which expert
        queue = deque([start])
        while start not in came:
            gpu = queue.popleft()
            for expert in np.flatnonzero(self.missing_EG[:, gpu] < 0).tolist():
                for other in np.flatnonzero(self.missing_EG[expert] > 0).tolist():
                    if other not in came:
                        came[other] = gpu, expert
                        queue.append(other)
        gpu, incoming = came[start]
        changes, last = [], incoming
        while gpu != start:
            sender, expert = came[gpu]
            changes.append(Change(self.layer, gpu, last, expert))
            gpu, last = sender, expert
        return [Change(self.layer, start, last, incoming), *changes]

    def _carry_out(self, changes: list[Change]) -> Iterator[Transfer | Drop]:
        """The first GPU of a circle receives before it drops; all others drop what has just arrived elsewhere."""
        first = changes[0]
        if len(changes) > 1:
            yield from self._receive(first.gpu, first.new)
            for change in changes[1:]:
                yield from self._drop(change.gpu, change.old)
                yield from self._receive(change.gpu, change.new)
            yield from self._drop(first.gpu, first.old)
        else:
            yield from self._drop(first.gpu, first.old)
            yield from self._receive(first.gpu, first.new)

    def _receive(self, gpu: int, expert: int) -> Iterator[Transfer]:
        if not self.copies_EG[expert, gpu]:
            sources = np.flatnonzero(self.copies_EG[expert]).tolist()
            source = min(sources, key=lambda other: (bool(self.node_G[other] != self.node_G[gpu]), other))
            crosses = bool(self.node_G[source] != self.node_G[gpu])
            yield Transfer(self.layer, expert, source, gpu, crosses)
        self.copies_EG[expert, gpu] += 1
        self.missing_EG[expert, gpu] -= 1

    def _drop(self, gpu: int, expert: int) -> Iterator[Drop]:
        self.copies_EG[expert, gpu] -= 1
        self.missing_EG[expert, gpu] += 1
        if not self.copies_EG[expert, gpu]:
            yield Drop(self.layer, expert, gpu)


def _steepest_first(layer: list[Exchange]) -> list[tuple[float, list[Exchange]]]:
    """Cut a layer's exchanges, in their order, into runs of falling gain per move: the upper hull of gain over moves.

    A layer's fullest GPU may need several exchanges before another one is the fullest; they are worth what they bring
    together.
    """
    runs: list[tuple[float, int, list[Exchange]]] = []
    for one in layer:
        gain, moves, run = one.gain, one.moves, [one]
        while runs and runs[-1][0] / max(runs[-1][1], 1) <= gain / max(moves, 1):
            more, further, before = runs.pop()
            gain, moves, run = gain + more, moves + further, before + run
        runs.append((gain, moves, run))
    return [(gain / max(moves, 1), run) for gain, moves, run in runs]
