"""`generate` and `serve` with `--processes N`: experts of a model on disk, spread over processes with own memory.

Process 0 has the model: weights outside experts, KV cache, requests. Every process, 0 included, has slots for its own
experts within its own budget, and reads them from the same checkpoint or packed copy.

Shapes: L layers with experts, E experts, G processes.
"""

import json
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from offload.cli import Processes
from placement import Plan

from ..train.distributed.launch import is_leader, is_worker, launch

WAIT = timedelta(days=365)
"""A server may be idle for any time. A process that ends closes its connections, which ends every wait for it."""
Owners = list[list[int]]
"""Per MoE layer, the process of each expert."""


def equal_parts_E(experts: int, processes: int) -> list[int]:
    """The process of each expert: neighbours together, as many on each as on any other, or one more."""
    return [expert * processes // experts for expert in range(experts)]


def owners(experts_L: Sequence[int], plan_file: Path | None, processes: int) -> Owners:
    """Who computes which expert: as a plan says, else equal parts of each layer.

    Raises:
        ValueError: if the plan is for another number of GPUs or another model, or keeps an expert on none of them.
    """
    if plan_file is None:
        return [equal_parts_E(experts, processes) for experts in experts_L]
    plan = Plan.load(plan_file)
    if plan.experts_L.tolist() != list(experts_L):
        raise ValueError(f"the plan is of layers of {plan.experts_L.tolist()} experts, the model {list(experts_L)}")
    return owners_by(plan, processes)


def owners_by(plan: Plan, processes: int) -> Owners:
    """The process that computes each expert; those with several copies are dealt to their holders in turn.

    Raises:
        ValueError: if the plan is for another number of GPUs, or keeps an expert on none of them.
    """
    if plan.cluster.num_gpus != processes:
        raise ValueError(f"the plan is for {plan.cluster.num_gpus} GPUs; start one process for each, not {processes}")
    found = []
    for layer, (copies_EG, experts) in enumerate(zip(plan.copies_LEG, plan.experts_L, strict=True)):
        holders = [np.flatnonzero(row).tolist() for row in copies_EG[:experts]]
        if [] in holders:
            raise ValueError(f"the plan has no slot for expert {holders.index([])} of layer {layer}")
        found.append([own[expert % len(own)] for expert, own in enumerate(holders)])
    return found


def _join() -> bool:
    from torch import distributed

    distributed.init_process_group("gloo", timeout=WAIT)
    if not is_leader():
        # process 0 is asked to end, and ends the others
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    return is_leader()


class _Dealing:
    """Who computes what, known once the checkpoint is open.

    Args:
        plan_file: where the experts are, or None.
        rank, processes: this process, and how many there are.
    """

    def __init__(self, plan_file: Path | None, rank: int, processes: int) -> None:
        self._plan_file, self._rank, self._processes = plan_file, rank, processes
        self.owners: Owners = []

    def own(self, experts_L: Sequence[int]) -> Owners:
        """The experts of this process, per layer."""
        self.owners = owners(experts_L, self._plan_file, self._processes)
        return [[expert for expert, rank in enumerate(layer) if rank == self._rank] for layer in self.owners]


def _load(folder: str | Path, options: dict[str, Any], *, has_rest: bool) -> tuple[Any, _Dealing]:
    """This process's part of a model, once all processes have theirs.

    Raises:
        ValueError: if one of them, this or another, cannot load its part.
    """
    from torch import distributed

    from moe.parallel import LostProcess
    from offload import Part, load

    group = distributed.group.WORLD
    dealing = _Dealing(options["plan"], group.rank(), group.size())
    part = Part(experts_of=dealing.own, has_rest=has_rest)
    model, failure = None, ""
    try:
        model = load(folder, **options | {"plan": None, "prefetch": "off", "part": part})
    except (ValueError, OSError) as error:
        failure = str(error)
    failures: list[Any] = [None] * group.size()
    try:
        distributed.all_gather_object(failures, failure)
    except RuntimeError as error:
        raise LostProcess("another process has ended while models were loaded") from error
    if found := next(((rank, text) for rank, text in enumerate(failures) if text), None):
        raise ValueError(f"process {found[0]}: {found[1]}" if found[0] else found[1])
    return model, dealing


def _lead(folder: str | Path, **options: Any) -> Any:
    import torch
    from torch import distributed

    from moe.parallel import DealtExperts, Questions, experts_modules

    model, dealing = _load(folder, options, has_rest=True)
    questions = Questions(distributed.group.WORLD)
    for layer, bank in enumerate(experts_modules(model).values()):
        DealtExperts(bank, layer, torch.tensor(dealing.owners[layer]), questions)
    model.offload.of_others = lambda: [json.loads(text) for text in questions.reports()]
    model.offload.at_close.append(questions.stop)
    return model


def _follow(folder: str | Path, **options: Any) -> None:
    import torch
    from torch import distributed

    from moe.parallel import answer_questions, experts_modules

    try:
        model, _ = _load(folder, options, has_rest=False)
    except ValueError:  # process 0 says it
        sys.exit(0)
    banks = list(experts_modules(model).values())

    def compute(layer: int, x_ND: torch.Tensor, expert_N: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = banks[layer](x_ND, expert_N[:, None], torch.ones(len(expert_N), 1))
        return found

    answer_questions(compute, lambda: json.dumps(model.offload.report()), distributed.group.WORLD)
    model.offload.close()


def _peers() -> Any:
    from ..train.distributed.peers import GroupPeers

    return GroupPeers()


PROCESSES = Processes(
    are_started=is_worker,
    peers=_peers,
    start=lambda count: launch(sys.argv[1:], count),
    join=_join,
    lead=_lead,
    follow=_follow,
)
