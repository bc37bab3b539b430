"""What has been said, and how answers are chosen: the state of one conversation, and the file that keeps it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from routing.ground.expect import expect_folder, expect_name
from routing.ground.files import write_json

from ..engine.request import Sampling

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
SETTINGS = (*SAMPLING, "seed", "max_new_tokens")
VERSION = 1
"""Of the file that /save writes; a later form gets the next number."""
LARGEST_SESSION = 64 << 20
"""Bytes of a saved conversation that are read: some ten million words, more than any context holds."""


@dataclass
class Talk:
    """A conversation.

    Args:
        system: first message, from whoever set the task; empty for none.
        messages: `role` and `content` of user and assistant in turns.
        settings: numbers by name, for names in SETTINGS.
        thinking: whether the model reasons first; None leaves it to the template.
    """

    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    settings: dict[str, float] = field(default_factory=dict)
    thinking: bool | None = None

    @property
    def shown(self) -> list[dict[str, str]]:
        """All messages, the system's first."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.messages]

    def ask(self, text: str) -> None:
        """The user says something."""
        self.messages.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """The model has answered."""
        self.messages.append({"role": "assistant", "content": text})

    def undo(self) -> str:
        """Take the last question and its answer back; the question.

        Raises:
            ValueError: if there is none.
        """
        question = self.take_answer_back()
        self.messages.pop()
        return question

    def take_answer_back(self) -> str:
        """Take the last answer back, if there is one; the question that stays.

        Raises:
            ValueError: if nothing was asked.
        """
        if not self.messages:
            raise ValueError("nothing has been said yet")
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        return self.messages[-1]["content"]

    def set(self, name: str, value: str) -> None:
        """Change a setting; `default` takes it back.

        Raises:
            ValueError: for an unknown name or a value out of range.
        """
        expect_name(name, SETTINGS, "setting")
        if value == "default":
            self.settings.pop(name, None)
            return
        is_whole = name in ("seed", "max_new_tokens", "top_k")
        try:
            number = int(value) if is_whole else float(value)
        except ValueError:
            raise ValueError(f"{name} must be {'an integer' if is_whole else 'a number'}; got {value!r}") from None
        if name == "max_new_tokens" and number < 1:
            raise ValueError(f"max_new_tokens must be 1 or more; got {number}")
        if name != "max_new_tokens":
            Sampling(**{name: number})  # type: ignore[arg-type]
        self.settings[name] = number

    def save(self, file: Path) -> None:
        """Write the conversation, whole or not at all.

        Raises:
            ValueError: if it cannot be written there.
        """
        expect_folder(file)
        write_json(file, {"version": VERSION, **asdict(self)})


def load_talk(file: Path) -> Talk:
    """The conversation of a file.

    Raises:
        ValueError: if it cannot be read or is none.
    """
    try:
        if file.stat().st_size > LARGEST_SESSION:
            raise ValueError("it is too large")
        data: Any = json.loads(file.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise ValueError(f"its version is {data['version']}, this program reads {VERSION}")
        talk = Talk(system=_text(data["system"]), thinking=data["thinking"])
        for name, value in data["settings"].items():
            talk.set(name, str(value))
        for message in data["messages"]:
            {"user": talk.ask, "assistant": talk.answer}[message["role"]](_text(message["content"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"session {file}: cannot be read ({type(error).__name__}: {error})") from error
    return talk


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text; got {type(value).__name__}")
    return value
