"""Ctrl-C and SIGTERM between two steps instead of in the middle of one."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import typer

SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""SIGTERM is what Slurm, systemd and `docker stop` send some seconds before they kill."""


@contextmanager
def interrupt_noted() -> Iterator[Callable[[], bool]]:
    """While this is open a signal is noted, and the function that it gives says so; a second one is raised at once.

    Nothing changes outside the main thread, or for a signal that is ignored or handled by somebody else.
    """
    noted: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    with _handled(note):
        yield lambda: bool(noted)


@contextmanager
def hint_when_interrupted(hint: str) -> Iterator[None]:
    """Make SIGTERM an interrupt like Ctrl-C, and say how to go on after either."""
    try:
        with _handled(_interrupt):
            yield
    except KeyboardInterrupt:
        typer.echo(hint, err=True)
        raise


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    """Handle the signals that nobody but this file handles."""
    free = (signal.default_int_handler, signal.SIG_DFL, _interrupt)
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS if is_main}
    ours = {number: found for number, found in before.items() if found in free}
    for number in ours:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, found in ours.items():
            signal.signal(number, found)
