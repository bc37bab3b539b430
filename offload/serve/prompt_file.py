"""A file of prompts and a file of answers: one JSON object a line, answers in any number of runs."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIELDS = ("id", "prompt", "messages", "max_new_tokens", "seed")
LARGEST_FILE = 1 << 30
"""Bytes of a file of prompts; all of it is held in memory."""


@dataclass(frozen=True, kw_only=True)
class PromptLine:
    """One prompt of a file.

    Args:
        line: its line, from 1.
        prompt: raw text, or messages of a conversation.
        name: what the file calls it, or None.
        max_new_tokens: most tokens of this answer, or None for what the command says.
        seed: of this answer, or None for what the command says.
    """

    line: int
    prompt: str | Sequence[Mapping[str, Any]]
    name: str | int | None = None
    max_new_tokens: int | None = None
    seed: int | None = None


def read_prompts(file: Path) -> list[PromptLine]:
    """The prompts of a file; empty lines are passed over.

    Raises:
        ValueError: if the file is too large, has no prompt, or a line is none; the message names the line.
    """
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise ValueError(f"prompts {file}: larger than {LARGEST_FILE} bytes; cut it into several files")
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts {file}: cannot be read ({error})") from error
    prompts = [_prompt(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"prompts {file}: there is none; write one JSON object a line, with prompt or messages")
    return prompts


def _prompt(file: Path, number: int, line: str) -> PromptLine:
    where = f"prompts {file}, line {number}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(entry, dict) or ("prompt" in entry) == ("messages" in entry):
        raise ValueError(f"{where}: expected an object with either prompt or messages")
    if unknown := entry.keys() - set(FIELDS):
        raise ValueError(f"{where}: unknown field {sorted(unknown)[0]!r}; there are {', '.join(FIELDS)}")
    for field, least in (("max_new_tokens", 1), ("seed", 0)):
        value = entry.get(field)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{where}: {field} must be an integer of {least} or more; got {json.dumps(value)[:40]}")
    if not isinstance(entry.get("id"), str | int | None):
        raise ValueError(f"{where}: id must be text or an integer")
    return PromptLine(
        line=number,
        prompt=_text(where, entry["prompt"]) if "prompt" in entry else _messages(where, entry["messages"]),
        name=entry.get("id"),
        max_new_tokens=entry.get("max_new_tokens"),
        seed=entry.get("seed"),
    )


def _text(where: str, prompt: Any) -> str:
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"{where}: prompt must be a text that is not empty")
    return prompt


def _messages(where: str, messages: Any) -> list[dict[str, Any]]:
    is_list = isinstance(messages, list) and bool(messages)
    if not is_list or not all(isinstance(message, dict) and _is_message(message) for message in messages):
        raise ValueError(f"{where}: messages must be a list of objects with the texts role and content")
    return list(messages)


def _is_message(message: Mapping[str, Any]) -> bool:
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


class AnswerFile:
    """Answers, one JSON object a line, that are on disk one by one; a later run goes on after the last whole line.

    Args:
        file: where they are; a last line that a power cut has torn is cut off.
        prompts: what is answered.

    Raises:
        ValueError: if a line there is no answer to one of the prompts.
    """

    def __init__(self, file: Path, prompts: Sequence[PromptLine]) -> None:
        self._file = file
        names = {prompt.line: prompt.name for prompt in prompts}
        self.done: set[int] = set()
        if not file.exists():
            return
        data = file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode("utf-8", errors="replace").splitlines(), 1):
            self.done.add(_answered(file, number, line, names))
        if len(whole) < len(data):
            os.truncate(file, len(whole))

    def append(self, prompt: PromptLine, answer: Mapping[str, Any]) -> None:
        """Add the answer to a prompt, and wait until it is on disk."""
        entry = {"line": prompt.line, **({} if prompt.name is None else {"id": prompt.name}), **answer}
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done.add(prompt.line)


def _answered(file: Path, number: int, line: str, names: Mapping[int, str | int | None]) -> int:
    """The line of the prompt that a line answers."""
    try:
        entry = json.loads(line)
        answered = entry["line"]
        if answered in names and entry.get("id") == names[answered]:
            return int(answered)
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"answers {file}, line {number}: no answer to one of these prompts; give another --out")
