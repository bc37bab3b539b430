"""The loop of a conversation: read a line, obey or answer, until the user has had enough."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.text import Text

from routing.ground.terminal import plain_console

from .orders import ORDERS, Table
from .pages import MarkdownPage, Page, PlainPage
from .partners import Partner, Took
from .talk import Talk


def converse(talk: Talk, partner: Partner, *, shows_reasoning: bool) -> Talk:
    """Talk until the input ends or the user says so; in a terminal with history and Markdown, else line by line.

    Args:
        talk: where it begins.
        partner: who answers.
        shows_reasoning: whether reasoning is shown.

    Returns:
        The conversation at its end; another one after /load.
    """
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    console = plain_console()
    notes = console if is_terminal else plain_console(stderr=True)
    table = Table(talk, partner, lambda line: notes.print(Text(line, style="dim")), shows_reasoning)

    def page() -> Page:
        return MarkdownPage(console, shows_reasoning=table.shows_reasoning) if is_terminal else PlainPage(write)

    for line in _typed() if is_terminal else _lines():
        try:
            table.take(line)
            if table.is_asked:
                answer(table, page)
        except ValueError as error:
            notes.print(Text(str(error), style="red"))
        except RuntimeError as error:
            notes.print(Text(f"{error}; /again asks once more, /undo takes the question back", style="red"))
        if table.is_over:
            break
    return table.talk


def answer(table: Table, page: Callable[[], Page]) -> None:
    """Let the partner answer the last question. Ctrl-C stops the answer; what was said until then stays.

    Args:
        table: the conversation; the answer is added.
        page: makes what the answer is shown on.

    Raises:
        RuntimeError: if the partner fails; the question stays, for /again.
    """
    table.is_asked = False
    said: list[str] = []
    try:
        with closing(table.partner.reply(table.talk)) as pieces, page() as sheet:  # type: ignore[type-var]
            for piece in pieces:
                if isinstance(piece, Took):
                    table.took = piece
                    continue
                if piece.channel == "content":
                    said.append(piece.text)
                sheet.show(piece)
    except KeyboardInterrupt:
        table.say("stopped")
    if said:
        table.talk.answer("".join(said))


def answer_once(talk: Talk, partner: Partner) -> Took | None:
    """Write the answer to the last question on stdout, as plain text; what it took.

    Raises:
        RuntimeError: if the partner fails.
    """
    table = Table(talk, partner, lambda line: print(line, file=sys.stderr))
    answer(table, lambda: PlainPage(write))
    return table.took


def write(text: str) -> None:
    """Write to stdout at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _lines() -> Iterator[str]:
    """Lines of stdin that is no terminal."""
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n")


def _typed() -> Iterator[str]:
    """What a user types, with history; Ctrl-C empties the line, Ctrl-D ends."""
    session = _prompt_session()
    while True:
        try:
            line = session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if line.strip():
            yield line


def _prompt_session() -> Any:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("enter")
    def send(event: Any) -> None:
        event.current_buffer.validate_and_handle()

    file = _history_file()
    history: History = InMemoryHistory() if file is None else FileHistory(str(file))
    orders = WordCompleter([f"/{name}" for name in ORDERS], sentence=True)
    return PromptSession(
        history=history, completer=orders, complete_while_typing=False, multiline=True, key_bindings=keys
    )


def _history_file() -> Path | None:
    """Where lines are kept, readable by this user only; None if that is not possible."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    file = state / "expertier" / "chat_history"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600, exist_ok=True)
    except OSError:
        return None
    return file
