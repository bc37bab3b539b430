"""A migration cut into chunks that stall the engine no longer than a budget, the most useful moves first.

Between chunks the engine serves from the state that has been reached. Between plans of equal GPUs and slots a chunk is
made of whole exchanges, so each state is a plan. Else it is made of single steps: every expert has a live copy, and
layers go in order of what balance they gain per copy moved. Shapes: L layers, E experts, G GPUs.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import Plan
from .elastic import Drop, Migration, Transfer
from .exchanges import Exchange, exchanges, plan_after

Float = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Consecutive steps between two pauses for serving.

    Args:
        steps: transfers and drops in order.
        bytes: received by all GPUs.
        seconds: of the GPU that receives most, at its link's rate.
        exchanges: what it is made of where the state after it is a plan (`exchanges.plan_after`); else empty.
        gain: what the imbalance, summed over layers, falls by; 0 where it is not known.
    """

    steps: list[Transfer | Drop]
    bytes: float
    seconds: float
    exchanges: list[Exchange] = field(default_factory=list)
    gain: float = 0.0

    def to_json(self) -> dict[str, Any]:
        steps = [{"kind": type(step).__name__.lower(), **vars(step)} for step in self.steps]
        return {"bytes": self.bytes, "seconds": self.seconds, "gain": self.gain, "steps": steps}


def cut(
    current: Plan,
    migration: Migration,
    *,
    most_bytes: float = float("inf"),
    most_seconds: float = float("inf"),
    expert_bytes: float | None = None,
) -> list[Chunk]:
    """Cut a migration; an exchange or a single step that exceeds the budget alone is a chunk of its own.

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
    for part in _parts(current, migration):
        if open_chunk.parts and open_chunk.exceeds(part, most_bytes, most_seconds):
            chunks.append(open_chunk.close())
        open_chunk.add(part)
    return [*chunks, open_chunk.close()] if open_chunk.parts else chunks


def stop_after(current: Plan, migration: Migration, chunks: list[Chunk]) -> Migration:
    """The migration that ends with the last of these chunks: its plan is what then runs.

    Args:
        current: what runs now.
        migration: of `migrate`, from which `chunks` were cut.
        chunks: the first ones of `cut`.

    Raises:
        ValueError: if GPUs or slots of the two plans differ, so that the states between are no plans.
    """
    steps = [step for chunk in chunks for step in chunk.steps]
    done = [one for chunk in chunks for one in chunk.exchanges]
    if steps and not done:
        raise ValueError("a migration to other GPUs or slots is a plan at its end only; carry it out as a whole")
    moves = [step for step in steps if isinstance(step, Transfer)]
    size = sum(chunk.bytes for chunk in chunks) / max(len(moves), 1)
    return Migration(
        plan=plan_after(current, done, migration.plan),
        steps=steps,
        moved_bytes=len(moves) * size,
        node_crossing_bytes=sum(step.crosses_nodes for step in moves) * size,
        peak_extra_bytes=0.0 if current.cluster.ep.spare_slots or all(len(one.changes) == 1 for one in done) else size,
    )


def _parts(current: Plan, migration: Migration) -> list[Exchange]:
    """What is not divided: exchanges, or single steps where the states between are no plans."""
    if (current.cluster.num_gpus, current.num_slots) == (migration.plan.cluster.num_gpus, migration.plan.num_slots):
        return exchanges(current, migration.plan)
    steps = (step for layer in _layers_in_order(current, migration) for step in layer)
    return [Exchange(changes=[], steps=[step], gain=0.0) for step in steps]


class _Open:
    """A chunk that still takes steps."""

    def __init__(self, plan: Plan, size: float, gpus_before: int) -> None:
        self.plan, self.size = plan, size
        self.seconds_G = np.zeros(max(plan.cluster.num_gpus, gpus_before))
        self.parts: list[Exchange] = []
        self.bytes = 0.0

    def _seconds_G(self, steps: list[Transfer | Drop]) -> Float:
        """Time that each GPU's link needs for what it receives; GPUs that are given up receive nothing."""
        cluster, found_G = self.plan.cluster, np.zeros_like(self.seconds_G)
        for step in steps:
            if isinstance(step, Transfer) and step.target < cluster.num_gpus:
                rates = cluster.nic_bytes_per_s_G if step.crosses_nodes else cluster.nvlink_bytes_per_s_G
                found_G[step.target] += self.size / float(rates[step.target])
        return found_G

    def exceeds(self, part: Exchange, most_bytes: float, most_seconds: float) -> bool:
        after_s = float((self.seconds_G + self._seconds_G(part.steps)).max())
        after_bytes = self.bytes + self.size * part.moves
        return part.moves > 0 and (after_bytes > most_bytes * (1 + 1e-9) or after_s > most_seconds * (1 + 1e-9))

    def add(self, part: Exchange) -> None:
        self.parts.append(part)
        self.bytes += self.size * part.moves
        self.seconds_G += self._seconds_G(part.steps)

    def close(self) -> Chunk:
        found = Chunk(
            steps=[step for part in self.parts for step in part.steps],
            bytes=self.bytes,
            seconds=float(self.seconds_G.max()),
            exchanges=[part for part in self.parts if part.changes],
            gain=sum(part.gain for part in self.parts),
        )
        self.parts, self.bytes = [], 0.0
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
