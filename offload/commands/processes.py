"""One command on several processes; the program that joins all packages says how, because it knows all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

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
        join: meets the others; every process but one says nothing from then on. True for the one that speaks.
        spread: leaves each expert of a loaded model to one process, as a plan file says, or in equal parts (None).
    """

    are_started: Callable[[], bool]
    peers: Callable[[], Any]
    start: Callable[[int], int]
    join: Callable[[], bool]
    spread: Callable[[Any, Path | None], None]


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


def processes_of(cpu_memory: str, trace: Path | None) -> Processes:
    """How to run on several processes.

    Raises:
        ValueError: if an option cannot be kept by several processes, or nobody said how they run.
    """
    if trace is not None:
        raise ValueError("--trace records one process; leave --processes out")
    if cpu_memory == "auto":
        raise ValueError("with --processes say what each process may use: --cpu-memory SIZE")
    return joined_processes()
