"""Numbers, texts and lists at the head of a GGUF file, each bounded before memory is taken for it. Without torch."""

import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

# of a file's head: vocabularies of 262,144 tokens with their merges take some 20 MB
MAX_HEAD_BYTES = 256 << 20
# of a name or a key; ggml allows 64 for names
MAX_NAME_BYTES = 1024
STRING, LIST = 8, 9
NUMBERS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "|b1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
"""NumPy's names of the value types that have a fixed size."""


class CutShort(ValueError):
    """The file, or the part of it that is here, ends within its head."""


class HeadStream:
    """Reads a GGUF file from its beginning, and never more than the file or MAX_HEAD_BYTES.

    Args:
        file: for messages.
        stream: the file, opened.
        size: of the file, in bytes.
    """

    def __init__(self, file: Path, stream: BinaryIO, size: int) -> None:
        self._file, self._stream = file, stream
        self._left = min(size, MAX_HEAD_BYTES)
        self.position = 0

    def fault(self, what: str, kind: type[ValueError] = ValueError) -> ValueError:
        """What to raise about this file."""
        return kind(f"{self._file}: {what}; copy the file again")

    def expect_room(self, count: int, nbytes: int, what: str) -> None:
        """Refuse `count` things of `nbytes` bytes or more that cannot be in the rest of the head."""
        if count * nbytes > self._left:
            left = f"the {self._left} bytes that are left"
            raise self.fault(f"not a whole GGUF file: {count} {what} cannot be in {left}", CutShort)

    def take(self, nbytes: int) -> bytes:
        self.expect_room(nbytes, 1, "bytes")
        data = self._stream.read(nbytes)
        if len(data) != nbytes:
            raise self.fault("the file ends within its head", CutShort)
        self.position += nbytes
        self._left -= nbytes
        return data

    def number(self, kind: str) -> int:
        """A whole number, by its format letter in `struct`."""
        return int(struct.unpack(f"<{kind}", self.take(struct.calcsize(f"<{kind}")))[0])

    def text(self, most: int | None = None) -> str:
        """A string; of at most `most` bytes, if given."""
        length = self.number("Q")
        if most is not None and length > most:
            raise self.fault(f"a name of {length} bytes at byte {self.position}, more than {most}")
        data = self.take(length)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fault(f"a text before byte {self.position} is not UTF-8 ({error.reason})") from error

    def value(self, kind: int) -> Any:
        """One value of the metadata: a number, a text, a list of texts, or an array of numbers."""
        if kind in NUMBERS:
            dtype = np.dtype(NUMBERS[kind])
            return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        if kind == STRING:
            return self.text()
        if kind == LIST:
            return self._list(self.number("I"), self.number("Q"))
        raise self.fault(f"a value of unknown type {kind} at byte {self.position}")

    def _list(self, kind: int, count: int) -> Any:
        if kind in NUMBERS:
            dtype = np.dtype(NUMBERS[kind])
            self.expect_room(count, dtype.itemsize, "numbers")
            return np.frombuffer(self.take(count * dtype.itemsize), dtype)
        if kind == STRING:
            self.expect_room(count, 8, "texts")
            return [self.text() for _ in range(count)]
        raise self.fault(f"a list of values of type {kind} at byte {self.position}")
