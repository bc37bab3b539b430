"""How a cache starts: slots per layer, and what is in them first, from a plan (`expertier place tiers`) or a trace.

Shapes: L MoE layers, E experts, C cache slots. Without torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from routing.traces import RoutingTrace, lru_hits_LC

from ..memory.budget import spread_slots
from .capacities import spread_by_gain

MOST_BYTES = 64 << 20
"""Of a plan: room for the tiers of millions of experts, where the largest models have some ten thousand. The reader's
own limit of 2 GiB is meant for clusters; a JSON file of that size would fill the memory of one machine."""
MOST_ROWS = 65_536
"""Of a trace: counting the hits of every cache size took 3 s for so many rows of 16 layers, K = 8, on one slow core.
More rows were not tried; in experiments/records/2026-11-29_cache-policies 10,000 rows chose the slots."""


@dataclass(frozen=True)
class StartingPlan:
    """Experts that are to be in memory from the start, of each layer, in the order of ids.

    Args:
        experts_L: those in RAM slots.
        gpu_L: those that GPU slots hold for as long as the model runs; empty without a GPU.
        peer_L: those that the memory of other GPUs holds as long; empty without a GPU.
    """

    experts_L: tuple[tuple[int, ...], ...]
    gpu_L: tuple[tuple[int, ...], ...]
    peer_L: tuple[tuple[int, ...], ...] = ()

    def slots(self, slot_bytes_L: Sequence[int], least_L: Sequence[int], free_bytes: int) -> list[int]:
        """RAM slots per layer: those of the plan, and at least `least_L`.

        Raises:
            ValueError: if they do not fit.
        """
        return _slots(self.experts_L, slot_bytes_L, least_L, free_bytes, "cpu")

    def gpu_slots(self, slot_bytes_L: Sequence[int], least_L: Sequence[int], free_bytes: int) -> list[int] | None:
        """GPU slots per layer, as above; None leaves them to the budget, where the plan puts nothing on the GPU."""
        return _slots(self.gpu_L, slot_bytes_L, least_L, free_bytes, "gpu") if any(self.gpu_L) else None


def _slots(
    experts_L: Sequence[Sequence[int]],
    slot_bytes_L: Sequence[int],
    least_L: Sequence[int],
    free_bytes: int,
    memory: str,
) -> list[int]:
    slots = [max(len(experts), least) for experts, least in zip(experts_L, least_L, strict=True)]
    wanted = sum(count * size for count, size in zip(slots, slot_bytes_L, strict=True))
    if wanted > free_bytes:
        raise ValueError(
            f"the plan keeps {wanted} bytes of experts in {memory.upper()} memory and {free_bytes} bytes are left for "
            f"them; solve it again with `expertier place tiers --{memory}-memory {free_bytes}`, or give more memory"
        )
    return slots


@dataclass(frozen=True, eq=False)
class TracedSlots:
    """All the memory there is, spread over the layers so that an LRU would have hit most on a trace; empty at first.

    `hits_LC` counts the hits of an LRU of 0, 1, .. E slots in each layer.
    """

    hits_LC: NDArray[np.int64]
    experts_per_layer: tuple[int, ...]

    @property
    def experts_L(self) -> tuple[tuple[int, ...], ...]:
        return ((),) * len(self.experts_per_layer)

    @property
    def gpu_L(self) -> tuple[tuple[int, ...], ...]:
        return self.experts_L

    @property
    def peer_L(self) -> tuple[tuple[int, ...], ...]:
        return ()

    def gpu_slots(self, slot_bytes_L: Sequence[int], least_L: Sequence[int], free_bytes: int) -> None:
        """A trace sizes RAM slots only."""

    def slots(self, slot_bytes_L: Sequence[int], least_L: Sequence[int], free_bytes: int) -> list[int]:
        """Slots per layer: at least `least_L`, and no more bytes than `free_bytes`.

        Raises:
            ValueError: if the least do not fit.
        """
        least_bytes = sum(count * size for count, size in zip(least_L, slot_bytes_L, strict=True))
        more = (free_bytes - least_bytes) // max(slot_bytes_L)
        slots = spread_by_gain(self.hits_LC, sum(least_L) + more, least_L)
        return spread_slots(free_bytes, slot_bytes_L, self.experts_per_layer, slots)


def read_starting_plan(
    path: str | Path, experts_L: Sequence[int], *, node: int | None = None, has_gpu: bool = False
) -> StartingPlan | TracedSlots:
    """Read the tiers of a plan file, or slots per layer off a routing trace.

    Args:
        path: JSON written by `expertier place`, or a routing trace (.npz) of the model.
        experts_L: experts of each layer of the model.
        node: whose part of a plan of several nodes; None takes a plan of one machine as a whole.
        has_gpu: whether there are GPU slots; without them the experts of the plan's GPUs belong in RAM.

    Raises:
        ValueError: if the file is not such a plan or trace, or is for a model of other sizes, or has no such node.
    """
    path = Path(path)
    if path.suffix != ".npz":
        return _read_plan(path, experts_L, node, has_gpu)
    if node is not None:
        raise ValueError(f"trace {path}: node {node} is of a plan of several nodes; a trace has none")
    return _read_trace(path, experts_L)


def _read_plan(path: Path, experts_L: Sequence[int], node: int | None, has_gpu: bool) -> StartingPlan:
    # here and not above: the contract needs SciPy, pydantic and PyYAML, and most models start without a plan
    from placement.contract.parts import node_part
    from placement.contract.plan import TIERS, Plan

    if not path.is_file():
        raise ValueError(f"plan {path}: no such file; make one with `expertier place tiers`")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"plan {path}: larger than {MOST_BYTES} bytes, so not a plan of one machine")
    plan = Plan.load(path)
    if node is not None:
        try:
            plan = node_part(plan, node)
        except ValueError as error:
            raise ValueError(f"plan {path}: {error}") from error
    tier_LE = plan.tier_LE
    if tier_LE is None and (plan.homes is not None or plan.cluster.num_nodes > 1):
        last = plan.cluster.num_nodes - 1
        raise ValueError(f"plan {path}: it is of {last + 1} nodes; say which one this machine is: node 0 to {last}")
    if tier_LE is None:
        raise ValueError(f"plan {path}: it says nothing about tiers; make one with `expertier place tiers`")
    if plan.experts_L.tolist() != list(experts_L):
        raise ValueError(
            f"plan {path}: tiers of {len(tier_LE)} layers of {tier_LE.shape[1]} experts do not fit the model's "
            f"{_layers(experts_L)}"
        )
    if ((tier_LE < 0) | (tier_LE >= len(TIERS))).any():
        known = " or ".join(f"{number} ({name})" for number, name in enumerate(TIERS))
        raise ValueError(f"plan {path}: a tier must be {known}; got {tier_LE.min()} to {tier_LE.max()}")
    real_LE = np.arange(tier_LE.shape[1]) < plan.experts_L[:, None]
    on_gpu_LE = (tier_LE == TIERS.index("gpu")) & real_LE
    in_memory_LE = (tier_LE != TIERS.index("ssd")) & real_LE
    if not has_gpu:
        return StartingPlan(experts_L=_ids(in_memory_LE), gpu_L=_ids(np.zeros_like(on_gpu_LE)))
    below_LE = in_memory_LE & ~on_gpu_LE
    if plan.cluster.tiers.peers is None:
        return StartingPlan(experts_L=_ids(below_LE), gpu_L=_ids(on_gpu_LE))
    here_LE = on_gpu_LE & (plan.copies_LEG[:, :, 0] > 0)
    return StartingPlan(experts_L=_ids(below_LE), gpu_L=_ids(here_LE), peer_L=_ids(on_gpu_LE & ~here_LE))


def _ids(chosen_LE: NDArray[np.bool_]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row.nonzero()[0].tolist()) for row in chosen_LE)


def _read_trace(path: Path, experts_L: Sequence[int]) -> TracedSlots:
    trace = RoutingTrace.load(path)
    if trace.num_layers != len(experts_L) or trace.num_experts > max(experts_L):
        raise ValueError(
            f"trace {path}: {trace.num_layers} layers of {trace.num_experts} experts do not fit the model's "
            f"{_layers(experts_L)}"
        )
    return TracedSlots(lru_hits_LC(trace.rows(0, MOST_ROWS)), tuple(experts_L))


def _layers(experts_L: Sequence[int]) -> str:
    """The layers of a model, for messages."""
    return f"{len(experts_L)} layers of {', '.join(sorted({str(count) for count in experts_L}))} experts"
