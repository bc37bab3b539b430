"""Lines that begin with a slash: what the user wants of the conversation itself."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from routing.ground.expect import expect_choice, expect_name

from .partners import Partner, Took
from .talk import SETTINGS, Talk, load_talk

HELP = {
    "help": "this list",
    "new": "forget what has been said",
    "undo": "take the last question and its answer back",
    "again": "answer the last question once more",
    "system [TEXT]": "show or change the system message; `/system -` removes it",
    "set [NAME VALUE]": f"show or change {', '.join(SETTINGS)}; VALUE default takes it back",
    "think [on|off|auto|show|hide]": "whether the model reasons first, and whether that is shown",
    "save FILE": "keep the conversation in a file",
    "load FILE": "go on with a kept conversation",
    "stats": "speed of the last answer, experts, memory",
    "quit": "end; Ctrl-D does so too",
}
ORDERS = tuple(line.split()[0] for line in HELP)
"""The first word of each line of the help."""


@dataclass
class Table:
    """What a conversation has before it: its state, and how it is shown.

    Args:
        talk: the conversation, which most orders change.
        partner: who answers.
        say: shows a line to the user.
        shows_reasoning: whether reasoning is shown.
        took: what the last answer took; None before the first.
        is_over: whether the user has ended it.
        is_asked: whether the last question waits for an answer.
    """

    talk: Talk
    partner: Partner
    say: Callable[[str], None]
    shows_reasoning: bool = True
    took: Took | None = None
    is_over: bool = False
    is_asked: bool = False
    handlers: dict[str, Callable[[str], None]] = field(init=False)

    def __post_init__(self) -> None:
        self.handlers = {name: getattr(self, f"_{name}") for name in ORDERS}

    def take(self, line: str) -> None:
        """Obey an order, or take a question.

        Raises:
            ValueError: for an unknown order, or one that cannot be obeyed.
        """
        if not line.startswith("/") or line.startswith("//"):
            self.talk.ask(line[1:] if line.startswith("//") else line)
            self.is_asked = True
            return
        name, _, rest = line[1:].partition(" ")
        self.handlers[expect_name(name.strip(), ORDERS, "order")](rest.strip())

    def _help(self, rest: str) -> None:
        for name, what in HELP.items():
            self.say(f"/{name}: {what}")
        self.say("Enter sends; Alt-Enter begins a new line; Ctrl-C stops an answer; // begins a text with a slash")

    def _new(self, rest: str) -> None:
        self.talk.messages.clear()
        self.say("a new conversation")

    def _undo(self, rest: str) -> None:
        self.say(f"taken back: {self.talk.undo()[:60]}")

    def _again(self, rest: str) -> None:
        self.talk.take_answer_back()
        self.is_asked = True

    def _system(self, rest: str) -> None:
        if rest:
            self.talk.system = "" if rest == "-" else rest
        self.say(f"system: {self.talk.system}" if self.talk.system else "no system message")

    def _set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if name:
            self.talk.set(name, value.strip())
        shown = (f"{name} {self.talk.settings[name]:g}" for name in SETTINGS if name in self.talk.settings)
        self.say(", ".join(shown) or "all settings are the model's own")

    def _think(self, rest: str) -> None:
        if rest in ("show", "hide"):
            self.shows_reasoning = rest == "show"
        elif rest:
            expect_choice(rest, ("on", "off", "auto", "show", "hide"), "/think")
            self.talk.thinking = {"on": True, "off": False, "auto": None}[rest]
        wish = {True: "on", False: "off", None: "as the model likes"}[self.talk.thinking]
        self.say(f"thinking: {wish}, {'shown' if self.shows_reasoning else 'hidden'}")

    def _save(self, rest: str) -> None:
        self.talk.save(_file(rest, "/save"))
        self.say(f"kept in {rest}")

    def _load(self, rest: str) -> None:
        self.talk = load_talk(_file(rest, "/load"))
        self.say(f"{len(self.talk.messages)} messages from {rest}")

    def _stats(self, rest: str) -> None:
        self.say(self.took.line() if self.took is not None else "no answer yet")
        for line in self.partner.state():
            self.say(line)

    def _quit(self, rest: str) -> None:
        self.is_over = True


def _file(rest: str, order: str) -> Path:
    if not rest:
        raise ValueError(f"{order} needs the name of a file")
    return Path(rest).expanduser()
