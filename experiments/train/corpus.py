"""Text to train on: any file, folder or table column, or the sources of the running Python's standard library.

A corpus is two flat token streams, one to train on and one held out; whole documents fall on one side or the other.
"""

import hashlib
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .text.documents import SEPARATOR, Document, Reading, documents
from .text.domains import Domains
from .text.tokens import Encoder, expect_tokenizer, save_tokenizer

HELD_OUT_EVERY = 20
"""One document in so many is held out: 5 %, as much as an evaluation of 65,536 tokens needs of a small text."""
# the vocabulary of models that read bytes; tokens that a fingerprint looks at, so that it takes milliseconds
NUM_BYTES = 256
DIGEST_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Token streams of a text, split by document.

    Args:
        train: token ids to train on.
        held_out: token ids of documents that training never sees.
        vocab_size: V, one more than the largest id there may be.
        tokens_per_byte: of the training text; 1 for byte-level corpora.
        source: where the text came from, for messages.
        held_out_bytes: how many bytes each held-out token stands for; None where the training text's ratio is exact.
        tokenizer: path of the Hugging Face tokenizer; None where there is none.
        end_token: the id that ends a document, or None.
        pad_token: the id that fills up rows, if it is not the end token.
        origin: `data`, `column` and `tokenizer`, as `load_corpus` takes them; empty for streams made by hand.
        summary: files, bytes, and what was skipped why; one line.
        held_out_domains: name, first token and token after the last of each domain in the held-out stream: the folders
            directly below the folder of a text. Empty where there is none.
    """

    train: NDArray[np.integer]
    held_out: NDArray[np.integer]
    vocab_size: int
    tokens_per_byte: float
    source: str
    held_out_bytes: NDArray[np.float32] | None = None
    tokenizer: str | None = None
    end_token: int | None = None
    pad_token: int | None = None
    origin: dict[str, Any] = field(default_factory=dict)
    summary: str = ""
    held_out_domains: tuple[tuple[str, int, int], ...] = ()

    @property
    def is_bytes(self) -> bool:
        """Whether the tokens are bytes of UTF-8 text."""
        return self.tokenizer is None and self.vocab_size == NUM_BYTES

    @property
    def model_settings(self) -> dict[str, Any]:
        """What a model must know of its tokens, as keyword arguments of `moe.MoEConfig`."""
        return {"vocab_size": self.vocab_size, "eos_token_id": self.end_token, "pad_token_id": self.pad_token}

    def save_tokenizer(self, folder: Path) -> None:
        """Put beside a model what turns text into its tokens; nothing where they stand for no text."""
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder)
        elif self.is_bytes:
            from moe import save_byte_tokenizer

            save_byte_tokenizer(folder)

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal token streams, wherever they came from."""
        digest = hashlib.blake2b(digest_size=8)
        for stream in (self.train, self.held_out):
            for start in range(0, len(stream), DIGEST_TOKENS):
                digest.update(np.ascontiguousarray(stream[start : start + DIGEST_TOKENS]).astype("<i8").tobytes())
        return digest.hexdigest()


def load_corpus(data: str | None, *, column: str = "text", tokenizer: str | None = None) -> Corpus:
    """Read a corpus; in memory are the tokens and one document at a time.

    Args:
        data: a text file, a table (`.jsonl`, `.parquet`), a folder of either, or None (also `stdlib`) for the standard
            library's sources. Text and JSON lines may be compressed (gzip, bzip2, xz, zstandard, lz4).
        column: the text column of a table; rows that are null or blank are skipped.
        tokenizer: folder of a Hugging Face tokenizer, or its `tokenizer.json`; None reads bytes (V = 256).

    Raises:
        ValueError: if there is nothing to read, or too little for a held-out part.
    """
    source, reading = data or "stdlib", Reading()
    expect_tokenizer(tokenizer)
    domains = Domains(is_read=data not in (None, "stdlib"))
    found = _split(documents(data, column, reading, whole_characters=tokenizer is not None), domains)
    origin = {"data": _absolute(data), "column": column, "tokenizer": _absolute(tokenizer)}
    if tokenizer is None:
        streams = _byte_streams(found, domains)
        facts: dict[str, Any] = {"vocab_size": NUM_BYTES, "tokens_per_byte": 1.0, "end_token": SEPARATOR[0]}
    else:
        streams, facts = _token_streams(found, Encoder(tokenizer), domains)
        facts["tokenizer"] = tokenizer
    if len(streams[0]) < 2 or len(streams[1]) < 2:
        raise ValueError(f"{source}: the text is too few bytes to train on and hold some out ({reading})")
    facts |= {"origin": origin, "summary": str(reading), "held_out_domains": tuple(domains.spans)}
    return Corpus(train=streams[0], held_out=streams[1], source=source, **facts)


def _absolute(path: str | None) -> str | None:
    return None if path in (None, "stdlib") else str(Path(path).absolute())


def _split(found: Iterator[Document], domains: Domains) -> Iterator[tuple[Document, bool]]:
    """Documents, and whether they are held out: those whose name hashes to 0; of few, or of a file's pieces, the last.

    A domain of two documents and more has one held out: its last one, if no name in it hashes to 0. Each document is
    given when the next one is there, because the last one may have to be held out.
    """
    first = list(islice(found, 1))
    if first and first[0].name is not None:
        first += islice(found, HELD_OUT_EVERY)
        if len(first) <= HELD_OUT_EVERY:
            held_out = {len(first) - 1} | _last_of_domains([domains.of(document) for document in first])
            yield from ((document, place in held_out) for place, document in enumerate(first))
            return
    waiting, is_any_held_out = None, False
    domain, num_waiting = "", 0  # of the documents since a domain began, while none of them is held out
    for document in chain(first, found):
        if waiting is not None:
            is_last = domain != domains.of(document)
            is_held_out = waiting[1] or bool(domain and is_last and num_waiting > 1)
            is_any_held_out |= is_held_out
            yield waiting[0], is_held_out
            num_waiting = 0 if is_last else num_waiting
        domain = domains.of(document)
        is_held_out = document.name is not None and zlib.crc32(document.name.encode()) % HELD_OUT_EVERY == 0
        num_waiting = num_waiting + 1 if not is_held_out and num_waiting >= 0 else -1
        waiting = document, is_held_out
    if waiting is not None:
        yield waiting[0], waiting[1] or not is_any_held_out or bool(domain and num_waiting > 1)


def _last_of_domains(domains: list[str]) -> set[int]:
    """The place of the last document of each domain that has more than one."""
    last = {domain: place for place, domain in enumerate(domains) if domain}
    return {place for domain, place in last.items() if domains.count(domain) > 1}


def _byte_streams(found: Iterable[tuple[Document, bool]], domains: Domains) -> list[NDArray[np.uint8]]:
    streams = bytearray(), bytearray()
    for document, is_held_out in found:
        stream = streams[is_held_out]
        stream += SEPARATOR + document.text if stream else document.text
        if is_held_out:
            domains.note(document, len(stream) - len(document.text), len(stream))
    return [np.frombuffer(stream, np.uint8) for stream in streams]


def _token_streams(
    found: Iterable[tuple[Document, bool]], encode: Encoder, domains: Domains
) -> tuple[list[NDArray[np.int32]], dict[str, Any]]:
    """Both streams, and what the corpus knows of them."""
    streams, held_out_bytes, train_bytes = (bytearray(), bytearray()), bytearray(), 0.0
    for document, is_held_out in found:
        ids, sizes = encode(document.text)
        streams[is_held_out].extend(ids.tobytes())
        if is_held_out:
            end = len(streams[1]) // ids.itemsize
            domains.note(document, end - len(ids), end)
            held_out_bytes += sizes.tobytes()
        else:
            train_bytes += float(sizes.sum(dtype=np.float64))
    train, held_out = (np.frombuffer(stream, np.int32) for stream in streams)
    return [train, held_out], {
        "vocab_size": encode.vocab_size,
        "tokens_per_byte": len(train) / max(train_bytes, 1.0),
        "held_out_bytes": np.frombuffer(held_out_bytes, np.float32),
        "end_token": encode.end_token,
        "pad_token": encode.pad_token,
    }


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
        seed: draws the order of sequences, the same for each epoch count.
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
