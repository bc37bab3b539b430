"""Processes that do one run together, each with the whole model, its own slots and its own records."""

from typing import Any, Protocol


class Peers(Protocol):
    """What a process knows of the others.

    Args:
        number: of this process, from 0; process 0 writes metrics, commits and the result.
        count: processes of the run.
    """

    number: int
    count: int

    def gather(self, value: Any) -> list[Any]:
        """What each process gave, in the order of their numbers; all call this together."""
        ...


class Alone:
    """A run in one process."""

    number, count = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]
