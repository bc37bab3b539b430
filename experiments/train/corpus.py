"""Text to train on: any file, folder or table column, or the sources of the running Python's standard library.

A corpus is two flat token streams, one to train on and one held out; whole documents fall on one side or the other.
"""

import hashlib
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HELD_OUT_EVERY = 20
MAX_FILE_BYTES = 4 << 30
NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
SEPARATOR = b"\0"


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Token streams of a text, split by document.

    Args:
        train: token ids to train on.
        held_out: token ids of documents that training never sees.
        vocab_size: V.
        tokens_per_byte: 1 for byte-level corpora; turns nats per token into bits per byte.
        source: where the text came from.
    """

    train: NDArray[np.integer]
    held_out: NDArray[np.integer]
    vocab_size: int
    tokens_per_byte: float
    source: str

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal token streams, wherever they came from."""
        digest = hashlib.blake2b(digest_size=8)
        for stream in (self.train, self.held_out):
            digest.update(np.ascontiguousarray(stream).astype("<i8").tobytes())
        return digest.hexdigest()


def load_corpus(data: str | None, *, column: str = "text", tokenizer: str | None = None) -> Corpus:
    """Read a corpus.

    Args:
        data: a text file, a folder (its text files, recursively), a `.jsonl` or `.parquet` table, or None (also
            `stdlib`) for the standard library's sources.
        column: the text column of a table.
        tokenizer: path of a Hugging Face tokenizer; None reads bytes (V = 256).

    Raises:
        ValueError: if there is nothing to read, or too little for a held-out part.
    """
    source = data or "stdlib"
    train_documents, held_out_documents = _split(list(_documents(data, column)))
    num_bytes = sum(len(document) for document in [*train_documents, *held_out_documents])
    if not train_documents or not held_out_documents:
        raise ValueError(f"{source}: {num_bytes} bytes of text are too few to train on and hold some out")
    if tokenizer is None:
        streams = [_byte_stream(part) for part in (train_documents, held_out_documents)]
        return Corpus(train=streams[0], held_out=streams[1], vocab_size=256, tokens_per_byte=1.0, source=source)
    encode, vocab_size = _tokenizer(tokenizer)
    streams = [
        np.concatenate([encode(document) for document in part]) for part in (train_documents, held_out_documents)
    ]
    return Corpus(
        train=streams[0],
        held_out=streams[1],
        vocab_size=vocab_size,
        tokens_per_byte=sum(map(len, streams)) / num_bytes,
        source=source,
    )


def _documents(data: str | None, column: str) -> Iterator[tuple[str, bytes]]:
    """Name and text of each document."""
    if data in (None, "stdlib"):
        return _folder(Path(sysconfig.get_paths()["stdlib"]), "*.py")
    path = Path(data)
    if path.is_dir():
        return _folder(path, "*")
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; at most {MAX_FILE_BYTES} are read, split the file")
    if path.suffix == ".jsonl":
        return _jsonl(path, column)
    if path.suffix == ".parquet":
        return _parquet(path, column)
    return _chunks(path)


def _folder(root: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root)
        if path.is_file() and not NOT_LIBRARY.intersection(name.parts[:-1]) and path.stat().st_size <= MAX_FILE_BYTES:
            text = path.read_bytes()
            if text and SEPARATOR not in text:
                yield name.as_posix(), text


def _chunks(path: Path) -> Iterator[tuple[str, bytes]]:
    """A single file as HELD_OUT_EVERY pieces, so that its last piece can be held out."""
    text = path.read_bytes()
    size = max(1, -(-len(text) // HELD_OUT_EVERY))
    for start in range(0, len(text), size):
        yield f"{start:012d}", text[start : start + size]


def _jsonl(path: Path, column: str) -> Iterator[tuple[str, bytes]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number}: not JSON: {error}") from error
            if not isinstance(row, dict) or not isinstance(row.get(column), str):
                raise ValueError(f"{path} line {number}: expected an object with a string under {column!r}")
            yield f"{number:012d}", row[column].encode()


def _parquet(path: Path, column: str) -> Iterator[tuple[str, bytes]]:
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(path)
    except ValueError as error:
        raise ValueError(f"{path}: no readable Parquet file: {error}") from error
    if column not in table.schema_arrow.names:
        raise ValueError(f"{path}: no column {column!r}; it has {', '.join(table.schema_arrow.names)}")
    number = 0
    for batch in table.iter_batches(columns=[column]):
        for text in batch.column(0).to_pylist():
            number += 1
            if text:
                yield f"{number:012d}", text.encode()


def _split(documents: list[tuple[str, bytes]]) -> tuple[list[bytes], list[bytes]]:
    """Hold out the documents whose name hashes to 0; of a single file's pieces, or of few documents, the last."""
    is_held_out = [zlib.crc32(name.encode()) % HELD_OUT_EVERY == 0 for name, _ in documents]
    if not any(is_held_out) or len(documents) <= HELD_OUT_EVERY:
        is_held_out = [index == len(documents) - 1 for index in range(len(documents))]
    train = [text for (_, text), held_out in zip(documents, is_held_out, strict=True) if not held_out]
    return train, [text for (_, text), held_out in zip(documents, is_held_out, strict=True) if held_out]


def _byte_stream(documents: Iterable[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(SEPARATOR.join(documents), dtype=np.uint8)


def _tokenizer(path: str):
    from transformers import AutoTokenizer

    if not Path(path).exists():
        raise ValueError(f"{path}: no such tokenizer folder")
    tokenizer = AutoTokenizer.from_pretrained(path)

    def encode(document: bytes) -> NDArray[np.int32]:
        ids = tokenizer(document.decode("utf-8", "replace"), add_special_tokens=False)["input_ids"]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return np.array(ids + end, dtype=np.int32)

    return encode, len(tokenizer)


def copy_tokenizer(path: str, run: Path) -> None:
    """Put a tokenizer beside the model that was trained with it, so that `generate` finds it."""
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(path).save_pretrained(run)


def windows(stream: NDArray[np.integer], length: int) -> NDArray[np.integer]:
    """The stream cut into rows of `length` tokens; the rest at the end is left out.

    Raises:
        ValueError: if the stream is shorter than one row.
    """
    count = len(stream) // length
    if count == 0:
        raise ValueError(f"the corpus has {len(stream)} tokens, fewer than one sequence of {length}")
    return stream[: count * length].reshape(count, length)


@dataclass(frozen=True, eq=False)
class BatchOrder:
    """Endless epochs over windows, each in a new order; any batch can be asked for again, so resuming is exact.

    Args:
        windows_BS: rows of tokens, as from `windows`.
        batch_size: rows per batch.
        seed: of the order.
    """

    windows_BS: NDArray[np.integer]
    batch_size: int
    seed: int

    def batch(self, index: int) -> NDArray[np.int64]:
        """int64 [batch_size, S]: batch number `index`, counted from the first epoch on."""
        count = len(self.windows_BS)
        draws = (divmod(draw, count) for draw in range(index * self.batch_size, (index + 1) * self.batch_size))
        rows = [_epoch_order(count, epoch, self.seed)[place] for epoch, place in draws]
        return self.windows_BS[rows].astype(np.int64)


@lru_cache(maxsize=2)
def _epoch_order(count: int, epoch: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)
