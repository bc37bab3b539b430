"""One command on several processes; the program that joins all packages says how, because it knows all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import LoadOptions, quiet_transformers

ProcessesOption = Annotated[
    int | None,
    typer.Option(
        "--processes", min=1, help="Spread the experts over so many processes; --cpu-memory is that of each one."
    ),
]


@dataclass(frozen=True, kw_only=True)
class Processes:
    """How a command runs on several processes.

    Args:
        are_started: whether this is one of them.
        peers: meets the others for a run of fine-tuning, as `offload.fine_tune` takes them.
        start: runs this command line on so many processes; the exit code.
        join: meets the others. True for the process that has the model; the others are to follow it.
        lead: loads that model; as `offload.load`, but that `plan` says which process has which expert.
        follow: loads experts, and computes what is asked of them until the model is closed; takes the same arguments.
    """

    are_started: Callable[[], bool]
    peers: Callable[[], Any]
    start: Callable[[int], int]
    join: Callable[[], bool]
    lead: Callable[..., Any]
    follow: Callable[..., None]


_joined: list[Processes] = []


def join_processes(processes: Processes) -> None:
    """Tell the commands of this package how to run on several processes."""
    _joined[:] = [processes]


def joined_processes() -> Processes:
    """How a command runs on several processes.

    Raises:
        ValueError: if nobody said it.
    """
    if not _joined:
        raise ValueError("several processes are started by the command `expertier` only")
    return _joined[0]


def processes_of(options: LoadOptions, trace: Path | None = None) -> Processes:
    """How to run on several processes.

    Args:
        options: those of loading.
        trace: where the routing would go.

    Raises:
        ValueError: if an option cannot be kept by several processes, or nobody said how they run.
    """
    if trace is not None:
        raise ValueError("--trace records one process; leave --processes out")
    if options.cpu_memory == "auto":
        raise ValueError("with --processes say what each process may use: --cpu-memory SIZE")
    if options.device == "cuda" or options.gpu_memory not in ("auto", "0"):
        raise ValueError("--processes are of the CPU; leave out --device and --gpu-memory")
    if options.arithmetic == "exact":
        raise ValueError(
            "several processes keep the bits of our own products, not of transformers'; take --arithmetic fixed"
        )
    if options.depth != "all" and not options.depth.isdecimal():
        raise ValueError(f"--depth {options.depth} would differ between processes; give a number of levels, or all")
    return joined_processes()


def for_processes(options: LoadOptions) -> dict[str, Any]:
    """Arguments of `lead` and `follow`: as for several users, rows of a question are computed together."""
    from ..serve.opening import arithmetic_for_many

    return {**options.for_loading, "arithmetic": arithmetic_for_many(options.arithmetic)}


def follow(several: Processes, model: str, options: LoadOptions) -> None:
    """Compute this process's experts for the one that has the model, until that one ends."""
    from ..checkpoint.location import local_folder

    quiet_transformers()
    several.follow(local_folder(model), **for_processes(options))
