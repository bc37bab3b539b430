"""`expertier generate --processes N`: the experts of a model on disk, spread over processes with memory of their own.

Shapes: L layers with experts, E experts, G processes.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offload.cli import Processes
from placement import Plan

from ..train.distributed.launch import is_leader, is_worker, launch


def equal_parts_LE(layers: int, experts: int, processes: int) -> NDArray[np.int64]:
    """[L, E] the process of each expert: neighbours together, as many on each as on any other, or one more."""
    return np.tile(np.arange(experts) * processes // experts, (layers, 1))


def processes_LE(plan: Plan, processes: int) -> NDArray[np.int64]:
    """[L, E] the process that computes each expert; those with several copies are dealt to their holders in turn.

    Raises:
        ValueError: if the plan is for another number of GPUs, or keeps an expert on none of them.
    """
    if plan.cluster.num_gpus != processes:
        raise ValueError(f"the plan is for {plan.cluster.num_gpus} GPUs; start one process for each, not {processes}")
    copies_LEG = plan.copies_LEG
    if lost := np.argwhere(~copies_LEG.any(axis=2)).tolist():
        raise ValueError(f"the plan has no slot for expert {lost[0][1]} of layer {lost[0][0]}")
    holders = [[np.flatnonzero(row) for row in layer] for layer in copies_LEG]
    return np.array([[own[expert % len(own)] for expert, own in enumerate(layer)] for layer in holders])


def _join() -> bool:
    from ..train.distributed.run import join_group

    join_group()
    if not is_leader():
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(nowhere, stream.fileno())
    return is_leader()


def _spread(model: Any, plan_file: Path | None) -> None:
    import torch
    from torch import distributed

    from moe.parallel import SharedBatchExperts, experts_modules

    banks = list(experts_modules(model).values())
    G, (L, E) = distributed.get_world_size(), (len(banks), banks[0].num_experts if banks else 0)
    if not banks:
        raise ValueError("this model has no experts to spread over processes")
    rank_LE = equal_parts_LE(L, E, G) if plan_file is None else processes_LE(Plan.load(plan_file), G)
    if rank_LE.shape != (L, E):
        raise ValueError(
            f"the plan is of {rank_LE.shape[0]} layers of {rank_LE.shape[1]} experts, the model {L} of {E}"
        )
    for bank, rank_E in zip(banks, rank_LE, strict=True):
        SharedBatchExperts(bank, torch.from_numpy(rank_E), distributed.group.WORLD)


def _peers() -> Any:
    from ..train.distributed.peers import GroupPeers

    return GroupPeers()


PROCESSES = Processes(
    are_started=is_worker, peers=_peers, start=lambda count: launch(sys.argv[1:], count), join=_join, spread=_spread
)
