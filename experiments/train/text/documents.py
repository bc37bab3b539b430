"""Documents of a text file, a table, or a folder of either; what is skipped is counted with its reason."""

import bz2
import codecs
import gzip
import json
import lzma
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

MAX_FILE_BYTES = 4 << 30
"""Bound on one file, unpacked: a compressed file of a few kilobytes can hold terabytes."""
PIECE_BYTES = 8 << 20
"""Read at a time: large enough that Python's loop does not count, small beside any model."""
NUM_PIECES = 20
"""Documents that a single text file is cut into, the last of which is held out (5 %)."""
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
SEPARATOR = b"\0"
TABLES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
PACKED = {".gz", ".bz2", ".xz", ".zst", ".zstd", ".lz4"}
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
NOT_TEXT = {b"PK\x03\x04": "a zip archive", b"7z\xbc\xaf": "a 7z archive", b"Rar!": "a rar archive", b"%PDF": "a PDF"}
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class NotTextError(ValueError):
    """A file that cannot be read as text.

    Args:
        message: what is wrong and what to do, where it is the only file.
        reason: what is counted where other files can be read.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass
class Reading:
    """What was read so far.

    Args:
        files: files with at least one document.
        documents: documents, or pieces of a single text file.
        num_bytes: of the documents, in UTF-8.
        skipped: how many files or rows were left out, by reason.
    """

    files: int = 0
    documents: int = 0
    num_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        files = "1 file" if self.files == 1 else f"{self.files:,} files"
        text = f"{files}, {self.num_bytes:,} bytes, {self.documents:,} documents"
        if not self.skipped:
            return text
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.most_common())
        return f"{text}; {self.skipped.total():,} skipped: {reasons}"


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text.

    Args:
        text: its bytes, in UTF-8 unless the file itself is not.
        name: decides on which side it falls; None for the pieces of a single file, whose last one is held out.
        file: where it is from.
    """

    text: bytes
    name: str | None
    file: Path


def expect_data(data: str | None) -> None:
    """Raises ValueError if there is no such file or folder; reads nothing."""
    if data not in (None, "stdlib") and not Path(data).exists():
        raise ValueError(f"{data}: no such file or folder")


def documents(data: str | None, column: str, reading: Reading, *, whole_characters: bool = False) -> Iterator[Document]:
    """The documents that are not blank, in a fixed order.

    Args:
        data: a text file, a table (`.jsonl`, `.ndjson`, `.parquet`), a folder of either, or None (also `stdlib`) for
            the sources of the running Python's standard library; text and JSON lines may be compressed.
        column: the text column of tables.
        reading: is told what was read and what was skipped.
        whole_characters: cut a single file between characters instead of after equally many bytes.

    Raises:
        ValueError: if a file is missing, damaged, not text, or has no such column of strings.
    """
    expect_data(data)
    if data in (None, "stdlib"):
        found = _folder(Path(sysconfig.get_paths()["stdlib"]), "*.py", column, reading, NOT_LIBRARY)
    elif Path(data).is_dir():
        found = _folder(Path(data), "*", column, reading, frozenset())
    elif kind := _table_kind(Path(data)):
        found = _rows(Path(data), kind, column, "", reading)
    else:
        found = _pieces_of_file(Path(data), whole_characters)
    last = None
    for document in found:
        if _is_text(document.text, reading):
            reading.files += document.file != last
            last = document.file
            reading.documents += 1
            reading.num_bytes += len(document.text)
            yield document


def _is_text(text: bytes, reading: Reading) -> bool:
    """Count what is not: one rule for files and rows."""
    if not text.strip():
        reading.skipped["blank"] += 1
    elif SEPARATOR in text:
        reading.skipped["with a zero byte (binary)"] += 1
    else:
        return True
    return False


def _folder(root: Path, pattern: str, column: str, reading: Reading, left_out: frozenset | set) -> Iterator[Document]:
    complaint = None
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root)
        if not path.is_file() or left_out.intersection(name.parts[:-1]):
            continue
        kind = _table_kind(path)
        try:
            yield from _rows(path, kind, column, f"{name.as_posix()}:", reading) if kind else _whole_file(path, name)
        except NotTextError as error:
            complaint = complaint or error
            reading.skipped[error.reason] += 1
    if complaint is not None and not reading.documents:
        raise complaint


def _table_kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return TABLES.get(suffixes[-1]) if suffixes else None


def _whole_file(path: Path, name: Path) -> Iterator[Document]:
    yield Document(text=b"".join(_pieces(path, may_be_binary=True)), name=name.as_posix(), file=path)


def _pieces_of_file(path: Path, whole_characters: bool) -> Iterator[Document]:
    """A single file as NUM_PIECES documents; its length is counted first, so that one of them is held at a time."""
    length = sum(len(piece) for piece in _pieces(path))
    size, held = max(1, -(-length // NUM_PIECES)), bytearray()
    for piece in _pieces(path):
        held += piece
        while len(held) > size + 3:
            end = _character_end(held, size) if whole_characters else size
            yield Document(text=bytes(held[:end]), name=None, file=path)
            del held[:end]
    while held:
        end = _character_end(held, size) if whole_characters else size
        yield Document(text=bytes(held[:end]), name=None, file=path)
        del held[:end]


def _character_end(text: bytearray, end: int) -> int:
    """The first place from `end` on, 3 bytes on at most, where no UTF-8 character is cut."""
    return next((place for place in range(end, min(end + 3, len(text))) if text[place] & 0xC0 != 0x80), end + 3)


def _pieces(path: Path, *, may_be_binary: bool = False) -> Iterator[bytes]:
    """A file's text in UTF-8, without its byte order mark, PIECE_BYTES or a few more at a time."""
    with _opened(path) as (file, head):
        encoding = _encoding(head)
        decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)(errors="replace")
        total = 0
        while piece := file.read(PIECE_BYTES):
            total += len(piece)
            if total > MAX_FILE_BYTES:
                raise NotTextError(f"{path}: more than {MAX_FILE_BYTES} bytes of text; split the file", "too large")
            text = piece if decoder is None else decoder.decode(piece).encode("utf-8", "replace")
            if SEPARATOR in text and not may_be_binary:
                raise NotTextError(f"{path}: it holds zero bytes, so it is not text", "with a zero byte (binary)")
            yield text


def _encoding(head: bytes) -> str:
    return next((name for mark, name in BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], bytes]]:
    """A file, unpacked if its first bytes say that it is compressed, and the first bytes of what is in it.

    Raises:
        NotTextError: if it is an archive or a damaged compressed file.
    """
    with path.open("rb") as file:
        head = file.read(8)
    for magic, what in NOT_TEXT.items():
        if head.startswith(magic):
            raise NotTextError(f"{path} is {what}, not text; unpack it first", f"not text ({what})")
    compression = next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)
    try:
        if compression is not None:
            with _unpacked(path, compression) as file:
                head = file.read(8)
        with path.open("rb") if compression is None else _unpacked(path, compression) as file:
            yield file, head
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if compression is None:
            raise
        raise NotTextError(f"{path}: damaged {compression} file ({error}); fetch it again", "damaged") from error


def _unpacked(path: Path, compression: str) -> Any:
    if compression == "gzip":
        return gzip.open(path)
    if compression in ("zstd", "lz4"):
        import pyarrow

        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), compression)
    return bz2.open(path) if compression == "bz2" else lzma.open(path)


def _rows(path: Path, kind: str, column: str, prefix: str, reading: Reading) -> Iterator[Document]:
    rows = _jsonl(path, column) if kind == "jsonl" else _parquet(path, column)
    for number, text in rows:
        if text is None:
            reading.skipped["null"] += 1
        else:
            yield Document(text=text.encode("utf-8", "replace"), name=f"{prefix}{number:012d}", file=path)


def _jsonl(path: Path, column: str) -> Iterator[tuple[int, str | None]]:
    """Number and text of each line that is not blank; the first one must have the column."""
    seen = False
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number}: expected an object with the column {column!r}; got {line[:40]!r}")
        if column not in row and not seen:
            raise NotTextError(
                f"{path} line {number}: no column {column!r}; it has {', '.join(map(str, row)) or 'none'}",
                f"tables without the column {column!r}",
            )
        seen = True
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{path} line {number}: {column!r} must be a string or null; got {type(text).__name__}")
        yield number, text


def _lines(path: Path) -> Iterator[str]:
    rest = b""
    for piece in _pieces(path):
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line.decode("utf-8", "replace") for line in lines)
    yield rest.decode("utf-8", "replace")


def _parquet(path: Path, column: str) -> Iterator[tuple[int, str | None]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        _expect_strings(path, table.schema_arrow, column)
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=[column]):
            for text in batch.column(0).to_pylist():
                number += 1
                yield number, text
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: no readable Parquet file: {error}") from error


def _expect_strings(path: Path, schema: Any, column: str) -> None:
    from pyarrow import types

    def is_text(kind: Any) -> bool:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)

    if column not in schema.names:
        raise NotTextError(
            f"{path}: no column {column!r}; it has {', '.join(schema.names)}", f"tables without the column {column!r}"
        )
    if not is_text(schema.field(column).type):
        texts = [field.name for field in schema if is_text(field.type)]
        raise ValueError(
            f"{path}: column {column!r} holds {schema.field(column).type}, not strings; "
            f"columns of strings: {', '.join(texts) or 'none'}"
        )
