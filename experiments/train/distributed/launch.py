"""Start a command on several processes of this machine by torchrun, and how many there are; without torch."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..description.config import TrainConfig
from ..run_folder import checkpoints

OLDEST_TRANSFORMERS = "5.23"
"""Its expert parallelism takes implementations of others; earlier releases had other names for it."""
LOST = 75
"""Exit code of a process that ended because another one did, which is the one to be told of; `EX_TEMPFAIL`."""
ENDED_BY_SIGNAL = 128
"""What a shell adds to a signal's number when it reports how a program ended."""


def is_worker() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def started_processes() -> int:
    """How many processes torchrun started, on all machines; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if is_worker() else 1


def place_on_machine() -> tuple[int, int]:
    """Which process of this machine this is, and how many it has."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def restart_number() -> int:
    """How often torchrun has started these processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def start_name() -> str:
    """Tells this start of the processes from those before a restart; the same on all of them.

    torchrun's store outlives the processes. One that reads what another said of itself before a restart waits for it
    for good.

    Raises:
        ValueError: if torchrun may restart processes of several machines and shares its store with them: every machine
            counts its own restarts, so there is no such name.

    Source: https://github.com/pytorch/pytorch/issues/135712
    """
    if int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:
        return f"start {restart_number()}"
    if _most_restarts() > 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "restarts on several machines need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun"
        )
    return "start"


def is_resumed(run: Path, *, asked: bool) -> bool:
    """Whether a run continues: it was asked to, or torchrun started it again after a failure.

    Where torchrun may start processes again, `--resume` holds from the second time on: a machine that joins later has
    all of them start with the same command, and there may be no checkpoint yet.
    """
    if _most_restarts() == 0 or not is_worker():
        return asked
    return (asked or restart_number() > 0) and bool(checkpoints(run))


def _most_restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))


def is_leader() -> bool:
    """Whether this is the process that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def launch(
    arguments: Sequence[str],
    processes: int,
    *,
    restarts: int = 0,
    entry: Sequence[str] = (),
    address: str | None = None,
) -> int:
    """Run `expertier` with these arguments on so many processes of this machine; returns the exit code.

    Args:
        arguments: of the command line.
        processes: how many, 1 or more.
        restarts: how often all are started again after one has failed.
        entry: a program with its arguments, which goes on as the command that follows them.
        address: of this program as the processes see it, where that is another network; None is one and the same.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # what torchrun and its rendezvous log of a failure takes pages; what is to be known of it is one line
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    # as torchrun does: more threads than cores would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{address or 'localhost'}:0",
        rdzv_configs={"is_host": True},
        local_addr=address,
        max_restarts=restarts,
        monitor_interval=0.1,
    )
    command = [*entry, sys.executable, "-m", "experiments.cli", *arguments]
    try:
        elastic_launch(settings, command[0])(*command[1:])
    except ChildFailedError as error:
        return _told(error.failures, processes)
    except SignalException as error:
        return ENDED_BY_SIGNAL + error.sigval
    return 0


def _told(failures: Mapping[int, Any], processes: int) -> int:
    """The exit code of a launch of which processes have failed; a process that a signal ended could not say so."""
    causes = [pair for pair in failures.items() if pair[1].exitcode != LOST] or list(failures.items())
    rank, failure = min(causes, key=lambda pair: pair[1].timestamp)
    code: int = failure.exitcode
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    print(f"expertier: process {rank} of {processes} was ended by {name}; the others were stopped", file=sys.stderr)
    return ENDED_BY_SIGNAL - code


def expect_launchable(config: TrainConfig, parallel: str | None, processes: int) -> None:
    """Refuse what cannot run on so many processes before any is started.

    Args:
        config: settings of the run.
        parallel: axes such as `data=2,expert=2`, `auto`, or None.
        processes: how many there will be.

    Raises:
        ValueError: if the axes do not fit, the model or its optimiser cannot be split so, or transformers is too old.
    """
    import torch
    import transformers

    from moe import MoEConfig, MoEForCausalLM

    try:
        from moe.parallel import Layout, expect_splittable
    except ImportError as error:
        raise ValueError(
            f"several processes need transformers {OLDEST_TRANSFORMERS} or newer; found {transformers.__version__}"
        ) from error
    if config.optimizer != "adamw":
        raise ValueError(f"the optimizer {config.optimizer} runs in one process; take adamw, or leave --processes out")
    layout = Layout.parse(parallel, processes)
    with torch.device("meta"):
        expect_splittable(MoEForCausalLM(MoEConfig(**config.model)), layout)


def shared_out(config: TrainConfig, processes: int) -> TrainConfig:
    """The run with a step's sequences cut into enough micro-batches that every process has equally many.

    Args:
        config: of a new run; a step's sequences stay the same.
        processes: how many share a step, 1 or more.

    Raises:
        ValueError: if a step's sequences cannot be shared out so.
    """
    sequences = config.batch_size * config.accumulation
    if sequences % processes:
        raise ValueError(
            f"{processes} processes cannot share out the {sequences} sequences of a step; "
            f"take a number of processes that divides it"
        )
    counts = range(processes, sequences + 1, processes)
    accumulation = next(n for n in counts if n >= config.accumulation and sequences % n == 0)
    return replace(config, accumulation=accumulation, batch_size=sequences // accumulation)
