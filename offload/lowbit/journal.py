"""What a long run has finished, a line for each piece, so that a killed one goes on where it was."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 1 << 20
"""A longer line was not written by us."""
SAVE_EVERY_S = 0.5
"""Work that a crash may cost. Each save waits for the disk twice, as long as quantising a small expert takes."""


class Journal:
    """A file of JSON lines: first what the run is, then what it has done.

    A line that a crash cut short is dropped. Lines of another run are dropped too.

    Args:
        file: where it is.
        plan: what tells this run from another; JSON values.
        secure: called before lines are written: brings to the disk what they name.
    """

    def __init__(self, file: Path, plan: dict[str, Any], secure: Callable[[], None] = lambda: None) -> None:
        self.file, self._secure = file, secure
        self.done: list[dict[str, Any]] = []
        lines = _complete_lines(file)
        is_same = bool(lines) and lines[0] == json.loads(json.dumps(plan))
        self.done = lines[1:] if is_same else []
        self._rewrite([plan, *self.done])

    def append(self, *done: dict[str, Any]) -> None:
        """Note what is finished. It is on disk after SAVE_EVERY_S at the latest, if more follows, or after `save`."""
        self.done += done
        if time.monotonic() - self._saved_s > SAVE_EVERY_S:
            self.save()

    def save(self) -> None:
        """Bring everything to the disk: first what lines name, then the lines."""
        if self._saved < len(self.done):
            self._secure()
            with self.file.open("a", encoding="utf-8") as stream:
                stream.writelines(f"{json.dumps(each)}\n" for each in self.done[self._saved :])
                stream.flush()
                os.fsync(stream.fileno())
        self._saved, self._saved_s = len(self.done), time.monotonic()

    def keep(self, count: int) -> None:
        """Forget all but the first `count` pieces."""
        if count < len(self.done):
            self.done = self.done[:count]
            self._rewrite([_complete_lines(self.file)[0], *self.done])

    def remove(self) -> None:
        """The run is over."""
        self.file.unlink()

    def _rewrite(self, lines: list[dict[str, Any]]) -> None:
        whole = self.file.with_name(self.file.name + ".new")
        with whole.open("w", encoding="utf-8") as stream:
            stream.writelines(f"{json.dumps(line)}\n" for line in lines)
            stream.flush()
            os.fsync(stream.fileno())
        whole.replace(self.file)
        self._saved, self._saved_s = len(lines) - 1, time.monotonic()


def _complete_lines(file: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    if not file.is_file():
        return lines
    with file.open(encoding="utf-8", errors="replace") as stream:
        while line := stream.readline(MAX_LINE_BYTES):
            try:
                found = json.loads(line) if line.endswith("\n") else None
            except json.JSONDecodeError:
                found = None
            if not isinstance(found, dict):
                break
            lines.append(found)
    return lines
