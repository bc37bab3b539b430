"""A training run on several processes: process 0 does what a run in one process does, the others follow it.

Process 0 runs the ordinary loop: folder, metrics, progress, Ctrl-C. Before every step, evaluation and checkpoint it
tells the others what comes, so that all do the same and stop together; the others write nothing but their parts of
checkpoints.
"""

import gc
import logging
import os
import signal
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import AdamW

from moe.parallel import Degree, Layout, split
from offload import available_memory

from ..checkpoint import CheckpointPlace, write_checkpoint
from ..corpus import BatchOrder, Corpus, windows
from ..description.config import TrainConfig
from ..loop import UNWATCHED, TrainResult, precision_of, prepare, run_steps
from ..metrics import read_log
from ..precision import resolve_precision
from ..run_folder import LOG_FILE
from ..torch_run import build_model
from ..watching.watch import Watch
from .adapting import Timings
from .checkpoint import load_parts, save_parts
from .launch import is_resumed, place_on_machine, start_name
from .step import Parts, distributed_evaluation, distributed_step

# what process 0 says to the others
STEP, EVALUATE, SAVE, STOP = range(4)
GATHERED_SHARE = 0.1
"""Of a process's free memory, the most that gathered weights may take during a step: gradients take as much again."""
WAIT = timedelta(minutes=30)
"""How long a process waits for another that is alive: the slowest thing between two exchanges is reading a corpus."""


def train(
    config: TrainConfig,
    corpus: Corpus,
    run: Path,
    *,
    parallel: str | None = None,
    resume: bool = False,
    quiet: bool = False,
    watch: Watch = UNWATCHED,
) -> TrainResult | None:
    """Train a model on all processes that torchrun started; everything it leaves behind is under `run`.

    Args:
        config: settings, such as a preset.
        corpus: from `load_corpus`, the same on every process.
        run: folder for checkpoints, `metrics.jsonl`, and at the end the model with its tokenizer.
        parallel: axes such as `data=2,expert=2`, or `auto`; None splits no experts.
        resume: continue after the last finished checkpoint, of any number of processes.
        quiet: no progress bar.
        watch: what else process 0 shows of it.

    Returns:
        On process 0 how it ended; None on the others.

    Raises:
        ValueError: if `run` holds another run, the model cannot be split so, or the corpus is too short.
        FloatingPointError: if the loss or its gradient is no longer finite; the last checkpoint is from before.
        KeyboardInterrupt: on process 0 after Ctrl-C or SIGTERM, once the step that it came in is done and saved.
    """
    with process_group() as device:
        if device.type == "cpu":
            keep_to_own_cores()
        rank = distributed.get_rank()
        found, config = _agreed(run, config, corpus, device, resume=is_resumed(run, asked=resume))
        parts = build_parts(config, corpus, Layout.parse(parallel, distributed.get_world_size()), device)
        done = load_parts(found, parts.model, parts.optimizer) if found else 0
        if rank:
            _follow(parts)
            return None
        leader = _Leader(parts, run, done)
        try:
            result = run_steps(leader, config, corpus, run, done, quiet=quiet, watch=watch)
        except KeyboardInterrupt:
            leader.stop()
            raise
        leader.stop()
        return result


@contextmanager
def process_group() -> Iterator[torch.device]:
    """The processes that torchrun started, joined while this is open; gives this process's device.

    After an error the group is left as it is: the others may be waiting in it, and the end of this process tells them.
    """
    yield join_group()
    leave_group()


def leave_group() -> None:
    """Leave the group, and end its threads now.

    Cycles of torch's objects keep a group that was left. Its threads would run on while Python ends, and one that lets
    go of a tensor at that time aborts the process ("terminate called without an active exception").
    """
    distributed.destroy_process_group()
    gc.collect()


def join_group() -> torch.device:
    """Meet the processes that torchrun started; gives this process's device."""
    # it warns of every tensor that is split twice, as experts are
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", place_on_machine()[0]), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    store, rank, processes = next(distributed.rendezvous("env://", timeout=WAIT))
    store = distributed.PrefixStore(start_name(), store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=WAIT)
    return device


def keep_to_own_cores() -> None:
    """Keep this process and its threads to its share of the cores, where every process of the machine gets a whole one.

    A core's cache holds one process's work then. Otherwise the threads that exchange tensors push the others about.
    """
    cores, (rank, processes) = sorted(os.sched_getaffinity(0)), place_on_machine()
    share, rest = divmod(len(cores), processes)
    if share and not rest:
        os.sched_setaffinity(0, cores[rank * share : (rank + 1) * share])


def build_parts(config: TrainConfig, corpus: Corpus, layout: Layout, device: torch.device) -> Parts:
    """A run before its first step: every process draws the whole model from the seed, and keeps its part."""
    model = build_model(config, corpus, device)
    pieces = split(model, layout, device.type, stays_gathered=_has_room(model, device))
    order = BatchOrder(windows(corpus.train, config.sequence_length), config.batch_size, config.seed)
    return Parts(
        model=model,
        split=pieces,
        optimizer=split_optimizer(model, config),
        order=order,
        corpus=corpus,
        config=config,
    )


def _has_room(model: nn.Module, device: torch.device) -> bool:
    """Whether every process has memory for the whole model's weights during a step; the same answer on all of them."""
    whole = sum(parameter.nbytes for parameter in model.parameters())
    is_gpu, processes = device.type == "cuda", place_on_machine()[1]
    room = torch.cuda.mem_get_info(device)[0] if is_gpu else available_memory() // processes
    has_room = torch.tensor(float(whole <= GATHERED_SHARE * room), device=device)
    distributed.all_reduce(has_room, distributed.ReduceOp.MIN)
    return bool(has_room)


def split_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """AdamW over this process's parts; matrices decay, norms and biases do not."""
    groups: dict[tuple[bool, DeviceMesh | None], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        # the fused kernel takes parameters of one mesh at a time, or whole ones
        groups[parameter.ndim >= 2, getattr(parameter, "device_mesh", None)].append(parameter)
    return AdamW(
        [
            {"params": members, "weight_decay": config.weight_decay if is_matrix else 0.0}
            for (is_matrix, _), members in groups.items()
        ],
        lr=config.learning_rate,
        betas=config.betas,
        fused=True,
    )


def _agreed(
    run: Path, config: TrainConfig, corpus: Corpus, device: torch.device, *, resume: bool
) -> tuple[Path | None, TrainConfig]:
    """The checkpoint to continue from and the run's settings, as process 0 finds them."""
    facts: list[Any] = [None, None]
    if distributed.get_rank() == 0:
        found = prepare(run, config, corpus, resume=resume)
        facts = [found[-1], precision_of(found[-1])] if found else [None, resolve_precision(config, device)]
    distributed.broadcast_object_list(facts, src=0)
    return facts[0], replace(config, precision=facts[1])


class _Leader:
    """The run as process 0 has it; see `loop.Trainable`.

    Args:
        parts: of process 0.
        run: folder of the run.
        done: steps that were done before.
    """

    def __init__(self, parts: Parts, run: Path, done: int) -> None:
        self._parts, self._run, self._is_busy = parts, run, False
        self._timings = None
        if parts.split.degrees:
            log = [row for row in read_log(run / LOG_FILE) if row["step"] <= done] if done else []
            self._timings = Timings(parts.split.degrees, log, processes=parts.split.layout.processes)

    def step(self, number: int) -> dict[str, Any]:
        place = self._timings.choose() if self._timings else 0
        with self._told(STEP, number, place):
            row = distributed_step(self._parts, number, _degree(self._parts, place))
        if self._timings:
            self._timings.note(row)
        return row

    def evaluate(self) -> float:
        with self._told(EVALUATE):
            return distributed_evaluation(self._parts)

    def save(self, done: int) -> Path:
        parts = self._parts

        def write(folder: Path) -> None:
            folder.mkdir()
            with self._told(SAVE, done):
                distributed.broadcast_object_list([folder], src=0)
                save_parts(folder, done, parts.model, parts.optimizer)

        return write_checkpoint(CheckpointPlace(self._run, parts.config, parts.corpus), done, write)

    def stop(self) -> None:
        """End the others, unless an interrupt tore this process out of what it does with them: then they find out."""
        if not self._is_busy:
            _tell(STOP)

    @contextmanager
    def _told(self, command: int, number: int = 0, place: int = 0) -> Iterator[None]:
        self._is_busy = True
        _tell(command, number, place)
        yield
        self._is_busy = False


def _tell(command: int, number: int = 0, place: int = 0) -> None:
    """Say to all other processes what comes next; the place is that of a step's degree."""
    distributed.broadcast(torch.tensor([command, number, place]), src=0)


def _degree(parts: Parts, place: int) -> Degree | None:
    return parts.split.degrees[place] if parts.split.degrees else None


def _follow(parts: Parts) -> None:
    """Do what process 0 says until it says stop; only it is asked to end, and it ends the others."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    told = torch.zeros(3, dtype=torch.int64)
    while True:
        distributed.broadcast(told, src=0)
        command, number, place = told.tolist()
        if command == STOP:
            return
        if command == STEP:
            distributed_step(parts, number, _degree(parts, place))
        elif command == EVALUATE:
            distributed_evaluation(parts)
        else:
            folder: list[Any] = [None]
            distributed.broadcast_object_list(folder, src=0)
            save_parts(folder[0], number, parts.model, parts.optimizer)
