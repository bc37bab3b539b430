"""How an answer is shown while it grows: as Markdown in a terminal, as plain text elsewhere."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from ..text.printable import PrintablePieces
from .partners import Piece

REDRAWS_PER_S = 8
"""The unfinished paragraph is set anew so often; a terminal over a network follows. Other values were not tried."""


class Page(Protocol):
    """Shows one answer."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def show(self, piece: Piece) -> None: ...


class PlainPage:
    """Writes the text as it comes, without the reasoning.

    Args:
        write: receives text without control sequences.
    """

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write, self._clean = write, PrintablePieces()
        self._is_mid_line = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_mid_line:
            self._write("\n")

    def show(self, piece: Piece) -> None:
        """Write a piece."""
        if piece.channel == "content":
            self._put(self._clean.put(piece.text))

    def _put(self, text: str) -> None:
        if text:
            self._write(text)
            self._is_mid_line = not text.endswith("\n")


class MarkdownPage:
    """Sets finished paragraphs for good and redraws only the last one, so that long answers scroll as other text does.

    Args:
        console: of a terminal.
        shows_reasoning: show the reasoning too, dimmed.
    """

    def __init__(self, console: Console, *, shows_reasoning: bool) -> None:
        self._console, self._shows_reasoning = console, shows_reasoning
        self._clean = PrintablePieces()
        self._text, self._channel = "", "content"
        self._live = Live(console=console, transient=True, auto_refresh=False, get_renderable=self._picture)
        self._drawn_s = 0.0

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        self._set(self._text)

    def show(self, piece: Piece) -> None:
        """Show a piece."""
        if piece.channel != self._channel:
            self._set(self._text)
            self._text, self._channel = "", piece.channel
        self._text += self._clean.put(piece.text)
        done, self._text = finished_blocks(self._text)
        self._set(done)
        if time.monotonic() - self._drawn_s > 1 / REDRAWS_PER_S:
            self._live.refresh()
            self._drawn_s = time.monotonic()

    def _set(self, text: str) -> None:
        if text.strip() and (self._channel == "content" or self._shows_reasoning):
            self._console.print(self._rendered(text))

    def _picture(self) -> Text | Markdown:
        if self._channel == "reasoning" and not self._shows_reasoning:
            return Text("thinking ...", style="dim")
        return self._rendered(self._text)

    def _rendered(self, text: str) -> Text | Markdown:
        if self._channel == "reasoning":
            return Text(text.strip("\n"), style="dim italic")
        # a link's address stays visible: the model may write another text than where it leads
        return Markdown(text, hyperlinks=False)


def finished_blocks(text: str) -> tuple[str, str]:
    """Cut a Markdown text behind its last finished block: a blank line outside of fenced code.

    Returns:
        What will not change any more, and the rest.
    """
    cut, at, fence = 0, 0, ""
    for line in text.splitlines(keepends=True):
        at += len(line)
        mark = line.strip()
        if fence:
            fence = "" if mark.startswith(fence) and not mark.strip(fence[0]) else fence
        elif mark.startswith(("```", "~~~")):
            fence = mark[: len(mark) - len(mark.lstrip(mark[0]))]
        elif not mark and line.endswith("\n"):
            cut = at
    return text[:cut], text[cut:]
