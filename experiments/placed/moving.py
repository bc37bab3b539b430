"""A migration from one plan to another carried out while rows go through the layers.

Shapes: T rows of a trace, L layers, D model width, G processes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed

from moe.parallel import Move, MovingLayer
from placement import Migration, Plan, Transfer, migrate_checked
from routing.traces import RoutingTrace

from .work import Layer, Size, calls_of, relative, source_T, tokens


@torch.no_grad()
def migrate_live(current: Plan, target: Plan, trace: RoutingTrace, size: Size, forwards: int) -> dict[str, Any]:
    """Go from one plan to another between forwards, at least so many; all processes call this together.

    Args:
        current, target: of the same model; they may differ in the number of GPUs.
        trace: its first rows are routed again in every forward.
        size: of experts and tokens.
        forwards: passes through all layers; there are more if the migration needs more.

    Returns:
        `forwards`, `missed` (of all processes), `error` (largest, against whole experts), `moved_bytes` and
        `peak_extra_bytes` as carried out, `planned`: the same two as the migration says, `rounds`.
    """
    G = distributed.get_world_size()
    layers = [Layer(current, number, trace, size, G) for number in range(current.num_layers)]
    expert_bytes = sum(parameter[0].nbytes for parameter in layers[0].whole.parameters())
    migration = migrate_checked(current, target, expert_bytes)
    moving = [MovingLayer(layer.placed, layer.held, layer.copies) for layer in layers]
    # tokens are where processes stay to the end
    stay = min(current.cluster.num_gpus, target.cluster.num_gpus)
    own = [*calls_of(source_T(trace, stay), stay, size.rows_per_call), *[[trace.sequence_T[:0]]] * (G - stay)]
    rows, x_TD = own[distributed.get_rank()][0], tokens(trace, size)
    inputs = [layer.inputs(x_TD, rows) for layer in layers]
    right = [layer.right(*given) for layer, given in zip(layers, inputs, strict=True)]
    steps, done, missed, error, rounds = _rounds(moving, migration), 0, 0, 0.0, 0
    is_moving = True
    while is_moving or done < forwards:
        for layer, given, wanted in zip(layers, inputs, right, strict=True):
            found: Tensor = layer.placed(*given)
            missed += int(not torch.isfinite(found).all())
            error = max(error, relative(found, wanted))
        done += 1
        is_moving = next(steps, None) is not None
        rounds += is_moving
    slots = max(current.slots_per_gpu, target.slots_per_gpu)
    extra = max(held - slots for layer in moving for held in layer.most_held)
    sums = torch.tensor([missed, sum(layer.moved_bytes for layer in moving)])
    distributed.all_reduce(sums)
    worst = torch.tensor([error])
    distributed.all_reduce(worst, op=distributed.ReduceOp.MAX)
    return {
        "forwards": done,
        "missed": int(sums[0]),
        "error": float(worst),
        "rounds": rounds,
        "moved_bytes": int(sums[1]),
        "peak_extra_bytes": max(extra, 0) * expert_bytes,
        "planned": {"moved_bytes": migration.moved_bytes, "peak_extra_bytes": migration.peak_extra_bytes},
    }


def _rounds(moving: list[MovingLayer], migration: Migration) -> Iterator[int]:
    """The rounds of all layers, one after another."""
    for number, layer in enumerate(moving):
        steps = [step for step in migration.steps if step.layer == number]
        yield from layer.rounds([_move(step) for step in steps])


def _move(step: Any) -> Move:
    if isinstance(step, Transfer):
        return Move(expert=step.expert, source=step.source, target=step.target)
    return Move(expert=step.expert, source=None, target=step.gpu)
