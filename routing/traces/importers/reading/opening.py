"""Opening files from outside: bounded, told apart by their first bytes, read without executing anything."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A day of per-token routing of a 61-layer model is some GiB; larger files are cut, not read whole.
MAX_BYTES = 16 << 30
# One line holds one response; 256 MiB are 128,000 tokens x 61 layers x top-8 as text.
MAX_LINE_BYTES = 256 << 20
# traces hold positions and requests as int32
MOST = 2**31 - 1
MAGIC = {
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"PK\x03\x04": "a zip archive (.npz or .pt)",
    b"\x1f\x8b": "gzip; unpack it first",
    b"PAR1": "a Parquet table",
    b"\x80": "a Python pickle, which is not read because it can run code",
}


def binary_kind(path: Path) -> str | None:
    """What a file that is not text is, by its first bytes; None for text."""
    with path.open("rb") as file:
        head = file.read(4096)
    # first, because the length that a safetensors file begins with may look like any magic number
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < MAX_LINE_BYTES:
        return "a safetensors file"
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            return kind
    return "binary data" if b"\0" in head else None


def bounded(path: Path) -> Path:
    """The path, if it is a file of a size that is read.

    Raises:
        ValueError: if it is not there or too large.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; at most {MAX_BYTES} are read. Cut the recording")
    return path


def files_of(path: Path, *patterns: str) -> list[Path]:
    """The file, or the files of a folder that match a pattern, in order of names.

    Raises:
        ValueError: if a folder has none.
    """
    if not path.is_dir():
        return [bounded(path)]
    found = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
    if not found:
        names = ", ".join(sorted(file.name for file in path.iterdir())[:4]) or "nothing"
        raise ValueError(f"{path}: expected {' or '.join(patterns)} in this folder; it holds {names}")
    return [bounded(file) for file in found]


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1.

    Raises:
        ValueError: if the file is not UTF-8 text, or a line is too long.
    """
    if kind := binary_kind(bounded(path)):
        raise ValueError(f"{path}: expected text; this is {kind}")
    try:
        with path.open(encoding="utf-8-sig") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                if len(line) == MAX_LINE_BYTES:
                    raise ValueError(f"{path}: line {number} is longer than {MAX_LINE_BYTES} characters")
                if line.strip():
                    yield number, line.strip()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text; byte {error.start} is {error.object[error.start]:#04x}"
        ) from None


def json_records(path: Path, *patterns: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """JSON objects with the place of each: lines, one object, or a list of objects; of a file or a folder's files.

    Raises:
        ValueError: if something is not JSON, or not an object.
    """
    for file in files_of(path, *(patterns or ("*.json*",))):
        for where, value in _values(file):
            if not isinstance(value, dict):
                raise ValueError(f"{where}: expected a JSON object; got {type(value).__name__} {str(value)[:40]!r}")
            yield where, value


def parse_json(text: str, where: str) -> Any:
    """JSON without NaN and infinities.

    Raises:
        ValueError: with the place and the beginning of what is not JSON.
    """

    def refuse(name: str) -> float:
        raise ValueError(f"{where}: {name} is not a number that can be used")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        found = text[max(error.pos - 10, 0) : error.pos + 30]
        raise ValueError(f"{where}: expected JSON; near {found!r}: {error.msg}") from None
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None


def wanted(record: dict[str, Any], where: str, *keys: str) -> list[Any]:
    """The values of keys that must be there.

    Raises:
        ValueError: if one is missing; the message lists the keys that there are.
    """
    if missing := [key for key in keys if key not in record]:
        found = ", ".join(map(repr, list(record)[:12])) or "none"
        raise ValueError(f"{where}: the key {missing[0]!r} is missing; the keys are {found}")
    return [record[key] for key in keys]


def whole(value: Any, where: str, name: str) -> int:
    """A whole number >= 0.

    Raises:
        ValueError: if it is something else; 3.0 and "3" are something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST:
        raise ValueError(f"{where}: {name} must be a whole number in 0..{MOST}; got {value!r}")
    return value


def id_table(value: Any, where: str, axes: str) -> NDArray[np.int64]:
    """A rectangular array of integers.

    Args:
        value: nested lists, or an array.
        where: the place, for messages.
        axes: what the dimensions are, such as `[tokens, layers, K]`.

    Raises:
        ValueError: if rows are unequal, entries are not integers, or the dimensions are others.
    """
    try:
        table = np.asarray(value)
    except (ValueError, TypeError):
        raise ValueError(f"{where}: expected integers {axes}; rows are of unequal length, or no numbers") from None
    if table.size == 0 and table.ndim == 1:
        table = np.zeros((0,) * axes.count(",") + (0,), np.int64)
    if table.ndim != axes.count(",") + 1 or not np.issubdtype(table.dtype, np.integer):
        raise ValueError(f"{where}: expected integers {axes}; got {table.dtype} of shape {table.shape}")
    return table.astype(np.int64)


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    """Values of one file: a file that is one JSON value as a whole, or one value per line."""
    lines = text_lines(path)
    number, first = next(lines, (0, ""))
    if not first:
        raise ValueError(f"{path}: the file is empty")
    if first[0] == "[" or not _is_json(first):
        value = parse_json(path.read_text(encoding="utf-8-sig"), str(path))
        entries = value if isinstance(value, list) else [value]
        yield from ((f"{path}: entry {index}", entry) for index, entry in enumerate(entries))
        return
    yield f"{path}: line {number}", parse_json(first, f"{path}: line {number}")
    for number, line in lines:
        yield f"{path}: line {number}", parse_json(line, f"{path}: line {number}")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
