"""A migration cut into chunks that stall the engine no longer than a budget, the most useful layers first.

Between chunks the engine serves from the state that has been reached: every expert has a live copy after each step, so
any number of steps is a valid state. Layers are independent; they go in order of what balance they gain per copy moved.
Shapes: L layers, G GPUs.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import Plan
from .elastic import Drop, Migration, Transfer

Float = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive steps between two pauses for serving.

    Args:
        steps: transfers and drops in order.
        bytes: received by all GPUs.
        seconds: of the GPU that receives most, at its link's rate.
    """

    steps: list[Transfer | Drop]
    bytes: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        steps = [{"kind": type(step).__name__.lower(), **vars(step)} for step in self.steps]
        return {"bytes": self.bytes, "seconds": self.seconds, "steps": steps}


def cut(
    current: Plan,
    migration: Migration,
    *,
    most_bytes: float = float("inf"),
    most_seconds: float = float("inf"),
    expert_bytes: float | None = None,
) -> list[Chunk]:
    """Cut a migration; a step is never divided, so one that exceeds the budget alone is a chunk of its own.

    Args:
        current: what runs now.
        migration: of `migrate`.
        most_bytes: received by all GPUs in one chunk.
        most_seconds: of the busiest GPU's link in one chunk: NVLink inside a node, NIC between nodes.
        expert_bytes: bytes of one expert; None takes the cluster file's.

    Raises:
        ValueError: if no size of an expert is known, or a budget is not positive.
    """
    size = expert_bytes or migration.plan.cluster.model.bytes_per_expert
    if size is None:
        raise ValueError("chunks need model.expert_bytes in the cluster file, or model.hidden and moe_intermediate")
    if not (most_bytes > 0 and most_seconds > 0):
        raise ValueError(f"a chunk's budget must be positive; got {most_bytes} bytes, {most_seconds} s")
    chunks: list[Chunk] = []
    open_chunk = _Open(migration.plan, size, len(current.copies_LEG[0, 0]))
    for step in (step for layer in _layers_in_order(current, migration) for step in layer):
        if open_chunk.steps and open_chunk.exceeds(step, most_bytes, most_seconds):
            chunks.append(open_chunk.close())
        open_chunk.add(step)
    return [*chunks, open_chunk.close()] if open_chunk.steps else chunks


class _Open:
    """A chunk that still takes steps."""

    def __init__(self, plan: Plan, size: float, gpus_before: int) -> None:
        self.plan, self.size = plan, size
        self.seconds_G = np.zeros(max(plan.cluster.num_gpus, gpus_before))
        self.steps: list[Transfer | Drop] = []
        self.bytes = 0.0

    def _seconds(self, step: Transfer) -> float:
        cluster = self.plan.cluster
        if step.target >= cluster.num_gpus:
            return 0.0
        rates = cluster.nic_bytes_per_s_G if step.crosses_nodes else cluster.nvlink_bytes_per_s_G
        return self.size / float(rates[step.target])

    def exceeds(self, step: Transfer | Drop, most_bytes: float, most_seconds: float) -> bool:
        if isinstance(step, Drop):
            return False
        after_s = max(float(self.seconds_G.max()), float(self.seconds_G[step.target]) + self._seconds(step))
        return self.bytes + self.size > most_bytes * (1 + 1e-9) or after_s > most_seconds * (1 + 1e-9)

    def add(self, step: Transfer | Drop) -> None:
        self.steps.append(step)
        if isinstance(step, Transfer):
            self.bytes += self.size
            self.seconds_G[step.target] += self._seconds(step)

    def close(self) -> Chunk:
        found = Chunk(steps=self.steps, bytes=self.bytes, seconds=float(self.seconds_G.max()))
        self.steps, self.bytes = [], 0.0
        self.seconds_G[:] = 0
        return found


def _layers_in_order(current: Plan, migration: Migration) -> list[list[Transfer | Drop]]:
    """Steps of each layer; first the layers that gain most balance per copy moved, where loads are known."""
    by_layer: dict[int, list[Transfer | Drop]] = {}
    for step in migration.steps:
        by_layer.setdefault(step.layer, []).append(step)
    load = migration.plan.metadata.get("load")
    if load is None:
        return list(by_layer.values())
    gain_L = _peaks_L(current, np.array(load, np.float64)) - _peaks_L(migration.plan, np.array(load, np.float64))

    def worth(layer: int) -> float:
        moved = sum(isinstance(step, Transfer) for step in by_layer[layer])
        return -float(gain_L[layer]) / max(moved, 1)

    return [by_layer[layer] for layer in sorted(by_layer, key=worth)]


def _peaks_L(plan: Plan, load_LE: Float) -> Float:
    """Fullest GPU's share of each layer's load, in units of the mean GPU."""
    share_LE = load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1e-300) / plan.replicas_LE
    return np.asarray(np.einsum("le,leg->lg", share_LE, plan.copies_LEG).max(axis=1) * plan.cluster.num_gpus)
