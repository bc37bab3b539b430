"""The terminal while a model generates: its text on stdout, what is going on in one line on stderr."""

import os
import sys
from types import TracebackType
from typing import Self

from rich.cells import chop_cells
from rich.console import Group
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from routing.ground.terminal import plain_console


class Screen:
    """Shows stages, text and, if wanted, a status that stays below the text.

    A line that is redrawn and a text that grows cannot share a terminal: while both are wanted there, whole lines of
    text scroll away above, and only the last, unfinished one is redrawn together with the status.

    Args:
        is_live: show the status while text comes; without a terminal, a line of stderr each time.
    """

    def __init__(self, *, is_live: bool) -> None:
        self._console = plain_console(stderr=True)
        self._is_live = is_live
        self._is_shared = _is_same_terminal()
        self._line, self._status, self._stage = "", "", ""
        self._is_mid_line = False
        self._region = Live(
            console=self._console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            get_renderable=self._picture,
            refresh_per_second=8,
        )

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._region.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._region.stop()
        if self._line:
            self._write_lines([self._line])
            self._line = ""
        if self._is_mid_line:
            sys.stdout.write("\n")
            sys.stdout.flush()

    def stage(self, what: str) -> None:
        """Say what is being done now, until there is text."""
        self._stage = what
        if self._region.is_started:
            self._region.refresh()  # the thread that draws may not run while libraries are imported

    def show(self, piece: str) -> None:
        """Print the next piece of the text."""
        self._stage = ""
        if not (self._is_shared and self._region.is_started):
            sys.stdout.write(piece)
            sys.stdout.flush()
            self._is_mid_line = True
        elif self._is_live:
            self._scroll(piece)
        else:
            self._region.stop()
            self.show(piece)

    def status(self, line: str) -> None:
        """Say how it goes."""
        self._status = line
        if not self._console.is_terminal:
            self._console.print(line, soft_wrap=True)

    def _scroll(self, piece: str) -> None:
        """Send whole lines up, and keep the rest, which is narrower than the terminal."""
        *lines, rest = (self._line + piece).split("\n")
        *rows, rest = chop_cells(rest, self._console.width) or [""]
        self._line = rest
        if lines or rows:
            self._write_lines([*lines, *rows])

    def _write_lines(self, lines: list[str]) -> None:
        for line in lines:
            self._console.print(Text(line), soft_wrap=True)

    def _picture(self) -> Group:
        parts: list[Text | Spinner] = [Text(self._line)] if self._line else []
        if self._stage:
            parts.append(Spinner("dots", Text(self._stage)))
        elif self._is_live:
            parts.append(Text(self._status, style="dim"))
        return Group(*parts)


def _is_same_terminal() -> bool:
    """Whether stdout and stderr are shown in one place."""
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return False
    try:
        return os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    except (OSError, ValueError):
        return True
