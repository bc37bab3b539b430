"""Text to record a routing trace on: one file, or the text files of a folder, cut into sequences."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe import ByteText, TokenizerText

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst")


def text_files(path: Path) -> list[Path]:
    """The file itself, or all text files below a folder, sorted.

    Raises:
        ValueError: if there is none.
    """
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"data {path}: found no text file ({', '.join(TEXT_SUFFIXES)})")
    return files


def sequences(path: Path, text: "ByteText | TokenizerText", length: int, max_tokens: int) -> Iterator[list[int]]:
    """Token sequences of at most `length`, until `max_tokens` have been given."""
    left = max_tokens
    for file in text_files(path):
        token_ids = text.encode(file.read_text(encoding="utf-8", errors="replace"))
        for start in range(0, len(token_ids), length):
            piece = token_ids[start : start + min(length, left)]
            if not piece:
                return
            yield piece
            left -= len(piece)
            if left <= 0:
                return
