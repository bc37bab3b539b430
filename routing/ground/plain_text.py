"""What is no text although it is given as one, told by its first bytes: as text it would be noise without a word."""

import codecs
from pathlib import Path

KINDS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "a zip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a rar archive",
    b"%PDF": "a PDF",
    b"PAR1": "a Parquet table",
    b"\x93NUMPY": "a NumPy array",
}
WIDE_MARKS = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
HEAD_BYTES = 4096
"""Looked at for a zero byte, as git does to tell text from other files (8,000 there)."""


def expect_plain_text(file: Path) -> None:
    """Refuse a file that is compressed, an archive, a table, or text in 16 or 32 bits.

    Args:
        file: that is about to be read as UTF-8.

    Raises:
        ValueError: with what it is; what is in it is not guessed at further.
    """
    with file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    if (kind := next((kind for magic, kind in KINDS.items() if head.startswith(magic)), None)) is not None:
        raise ValueError(f"{file} is {kind}, not text; unpack it first")
    if head.startswith(WIDE_MARKS):
        raise ValueError(f"{file} is UTF-16 or UTF-32; save it as UTF-8")
    if b"\0" in head:
        raise ValueError(f"{file} holds zero bytes near its beginning, so it is no text")
