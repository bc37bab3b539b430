"""Consoles that print text as it is: no markup, so a path with brackets stays whole."""

from typing import Any

from rich.console import Console


def plain_console(*, stderr: bool = False, **options: Any) -> Console:
    """A console for tables and lines that hold paths, names and other text of users.

    Args:
        stderr: print to stderr instead of stdout.
        options: of `rich.console.Console`.
    """
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, **options)
