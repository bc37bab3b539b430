"""Text to record a routing trace on: one file, or the text files of a folder, cut into sequences."""

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from routing.ground.plain_text import expect_plain_text

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")
PIECE_BYTES = 1 << 16
"""Read at a time: some 16,000 tokens. A whole file at once would need some hundred times its size."""
LONGEST_WORD = 1 << 12
"""Characters at the end of a piece in which a place to cut is looked for."""


class Text(Protocol):
    """What turns text into tokens."""

    def encode(self, text: str) -> list[int]: ...


def text_files(path: Path) -> list[Path]:
    """The file itself, or all text files below a folder, sorted.

    Raises:
        ValueError: if there is none.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise ValueError(f"data {path}: no such file or folder")
    files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"data {path}: found no text file ({', '.join(TEXT_SUFFIXES)})")
    return files


def sequences(path: Path, text: Text, length: int, max_tokens: int) -> Iterator[list[int]]:
    """Token sequences of at most `length`, until `max_tokens` have been given.

    Files are read and tokenised a piece at a time, so memory depends on `length` and not on the size of the text.
    Only the last sequence of a file is shorter than `length`.

    Args:
        path: a text file, or a folder of them.
        text: tokenises.
        length: tokens of a sequence.
        max_tokens: tokens in all.
    """
    left = max_tokens
    for file in text_files(path):
        for piece in _cut(_tokens(file, text), length):
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                return


def _cut(runs: Iterator[list[int]], length: int) -> Iterator[list[int]]:
    waiting: list[int] = []
    for run in runs:
        waiting += run
        whole = len(waiting) // length * length
        for start in range(0, whole, length):
            yield waiting[start : start + length]
        waiting = waiting[whole:]
    if waiting:
        yield waiting


def _tokens(file: Path, text: Text) -> Iterator[list[int]]:
    """Tokens of a file, run by run.

    Pieces are cut before white space, where tokenizers cut too. Tokens that mark the start or the end of a text are
    left out inside; tokenizers that put a space before every text may give another token at a cut.
    """
    before, after = _marks(text)
    is_first = True
    expect_plain_text(file)
    decode = codecs.getincrementaldecoder("utf-8-sig")(errors="replace").decode
    rest = ""
    with file.open("rb") as stream:
        while data := stream.read(PIECE_BYTES):
            piece = rest + decode(data)
            end = _last_break(piece)
            rest = piece[end:]
            if end:
                run = text.encode(piece[:end])
                yield run[0 if is_first else before : len(run) - after]
                is_first = False
    if rest := rest + decode(b"", True):
        yield text.encode(rest)[0 if is_first else before :]


def _marks(text: Text) -> tuple[int, int]:
    """How many tokens a tokenizer adds before and after every text."""
    marks, one = text.encode(""), text.encode("a")
    before = next((place for place, mark in enumerate(marks) if one[place] != mark), len(marks))
    return before, len(marks) - before


def _last_break(piece: str) -> int:
    """Where the last word of a piece, which may go on, begins: at its white space. 0 waits for more text.

    A word that is longer than LONGEST_WORD is cut anywhere.
    """
    for place in range(len(piece) - 1, max(len(piece) - LONGEST_WORD, 0), -1):
        if piece[place].isspace() and not piece[place - 1].isspace():
            return place
    return len(piece) if len(piece) > LONGEST_WORD else 0
