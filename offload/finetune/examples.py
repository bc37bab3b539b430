"""Examples to fine-tune on: plain text, or JSON lines of texts, prompts with answers, or conversations.

A row of tokens is packed with whole examples. The loss counts answers only; plain text is all answer.

Shapes: N rows, B sequences, S positions.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe import open_tokenizer, text_of

from ..text.conversation import PLAIN_TEMPLATE
from .options import TuneOptions

NO_LOSS = -100
"""The label of a token that is not to be learnt; torch's cross entropy leaves it out."""
LARGEST_FILE = 4 << 30
"""Bytes of one file: its tokens take eight times as many in memory."""
LARGEST_LINE = 64 << 20
"""Bytes of one example; a book has some 1 MB."""
ROLES = ("system", "user", "assistant", "tool", "developer")

Example = tuple[list[int], list[bool]]
"""Token ids, and whether each is to be learnt."""


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Packed rows.

    Args:
        token_NS: ids, padded at the end.
        label_NS: the same, NO_LOSS where nothing is learnt.
        fingerprint: equal for equal rows.
    """

    token_NS: NDArray[np.int64]
    label_NS: NDArray[np.int64]
    fingerprint: str

    def batches(self, step: int, options: TuneOptions) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Ids and labels of all micro-batches of the step after `step` others."""
        return [
            self.batch(step, micro, options.accumulation, options.batch_size, options.seed)
            for micro in range(options.accumulation)
        ]

    def batch(
        self, step: int, micro: int, accumulation: int, batch_size: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels of one micro-batch, int64 `[B, S]`: every row once per epoch, in an order of the epoch's own.

        Args:
            step: optimiser steps before this one.
            micro: micro-batches of this step before this one.
            accumulation: micro-batches per step.
            batch_size: B, at least 1.
            seed: gives each epoch its order.
        """
        first = (step * accumulation + micro) * batch_size
        chosen = [self._row(first + place, seed) for place in range(batch_size)]
        return torch.from_numpy(self.token_NS[chosen]), torch.from_numpy(self.label_NS[chosen])

    def _row(self, place: int, seed: int) -> int:
        epoch, inside = divmod(place, len(self.token_NS))
        return int(np.random.default_rng([seed, epoch]).permutation(len(self.token_NS))[inside])


def read_rows(data: str | Path, model_folder: Path, vocab_size: int, length: int) -> PackedRows:
    """Read and pack examples.

    A `.jsonl` file has one object per line: `{"text": ...}`, `{"prompt": ..., "completion": ...}` or
    `{"messages": [{"role": ..., "content": ...}, ...]}`. Any other file is one text. Of a folder, its files in the
    order of their names.

    Args:
        data: file or folder.
        model_folder: for its tokenizer and chat template.
        vocab_size: V; ids must lie below.
        length: S; longer examples are cut into several rows.

    Raises:
        ValueError: if nothing is there to learn, or a line is not as above; with file and line.
    """
    encoder = _Encoder(model_folder, vocab_size)
    files = _files(Path(data))
    packed = _pack((example for file in files for example in _examples(file, encoder)), length, encoder.end_id or 0)
    if not packed:
        raise ValueError(f"data {data}: nothing to learn: no text, and no answer of an assistant")
    token_NS = np.array([ids for ids, _ in packed], dtype=np.int64)
    label_NS = np.where(np.array([learnt for _, learnt in packed]), token_NS, NO_LOSS)
    if (largest := int(token_NS.max())) >= vocab_size:
        raise ValueError(
            f"data {data}: token id {largest}, but the model has {vocab_size} tokens; is this its tokenizer?"
        )
    digest = hashlib.blake2b(token_NS.tobytes() + label_NS.tobytes(), digest_size=8).hexdigest()
    return PackedRows(token_NS, label_NS, digest)


class _Encoder:
    """Text and conversations as tokens of a model."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._text = text_of(folder, vocab_size)
        self._tokenizer = getattr(self._text, "tokenizer", None)
        self._folder = folder
        self.end_id: int | None = getattr(self._tokenizer, "eos_token_id", None)

    def text(self, text: str, *, is_begun: bool = False) -> list[int]:
        """Ids of a text; special tokens at its beginning only if nothing is before it."""
        if is_begun and self._tokenizer is not None:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._text.encode(text)

    def end(self) -> list[int]:
        return [] if self.end_id is None else [self.end_id]

    def conversation(self, messages: Sequence[dict[str, Any]], *, for_answer: bool) -> list[int]:
        """Ids of a conversation, up to where the next answer begins if it is `for_answer`."""
        if self._tokenizer is None:
            self._tokenizer = open_tokenizer(self._folder)
        ids = self._tokenizer.apply_chat_template(
            list(messages),
            chat_template=None if self._tokenizer.chat_template else PLAIN_TEMPLATE,
            add_generation_prompt=for_answer,
            tokenize=True,
            return_dict=False,
        )
        return [int(token_id) for token_id in ids]


def _files(data: Path) -> list[Path]:
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise ValueError(f"data {data}: no such file or folder")
    found = sorted(path for path in data.rglob("*") if path.is_file() and not path.name.startswith("."))
    if not found:
        raise ValueError(f"data {data}: the folder has no files")
    return found


def _examples(file: Path, encoder: _Encoder) -> Iterator[Example]:
    if file.stat().st_size > LARGEST_FILE:
        raise ValueError(f"data {file}: {file.stat().st_size} bytes; at most {LARGEST_FILE} of one file are read")
    if file.suffix not in (".jsonl", ".ndjson"):
        try:
            ids = encoder.text(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"data {file}: not UTF-8 text (byte {error.start})") from error
        yield ids + encoder.end(), [True] * (len(ids) + len(encoder.end()))
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield from _of_line(f"data {file}, line {number}", line, encoder)


def _of_line(where: str, line: bytes, encoder: _Encoder) -> Iterator[Example]:
    try:
        if len(line) > LARGEST_LINE:
            raise ValueError(f"{len(line)} bytes")
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not a JSON object ({error})") from error
    if isinstance(found, dict) and isinstance(found.get("messages"), list):
        yield from _of_conversation(where, found["messages"], encoder)
    elif isinstance(found, dict) and isinstance(found.get("text"), str):
        ids = encoder.text(found["text"]) + encoder.end()
        yield ids, [True] * len(ids)
    elif isinstance(found, dict) and all(isinstance(found.get(name), str) for name in ("prompt", "completion")):
        prompt = encoder.text(found["prompt"])
        answer = encoder.text(found["completion"], is_begun=True) + encoder.end()
        yield prompt + answer, [False] * len(prompt) + [True] * len(answer)
    else:
        raise ValueError(f'{where}: expected an object with "messages", "text", or "prompt" and "completion"')


def _of_conversation(where: str, messages: list[Any], encoder: _Encoder) -> Iterator[Example]:
    """A conversation with all answers to be learnt; one per answer if the template rewrites earlier turns."""
    for message in messages:
        is_message = isinstance(message, dict) and message.get("role") in ROLES
        if not is_message or not isinstance(message.get("content"), str | list | type(None)):
            raise ValueError(f'{where}: each message needs a "role" ({", ".join(ROLES)}) and "content"')
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    whole: Example = ([], [])
    for place in answers:
        ids, learnt = _of_answer(where, messages[: place + 1], encoder)
        if ids[: len(whole[0])] != whole[0]:
            yield whole
            whole = ([], [])
        learnt[: len(whole[1])] = whole[1]
        whole = (ids, learnt)
    if answers:
        yield whole


def _of_answer(where: str, messages: list[Any], encoder: _Encoder) -> Example:
    """A conversation that ends with an answer, and only that is to be learnt."""
    try:
        before = encoder.conversation(messages[:-1], for_answer=True)
        ids = encoder.conversation(messages, for_answer=False)
    except Exception as error:  # a template raises whatever it likes
        raise ValueError(
            f"{where}: the chat template refuses it ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    if ids[: len(before)] != before:
        raise ValueError(
            f"{where}: the chat template writes an answer otherwise than it asks for one, so its tokens cannot be told "
            'from the question\'s; give "prompt" and "completion" instead'
        )
    return ids, [False] * len(before) + [True] * (len(ids) - len(before))


def _pack(examples: Iterator[Example], length: int, padding: int) -> list[Example]:
    """Rows of `length` tokens: examples one after the other, each begun on a row that has room for all of it.

    An example that is longer than a row goes on in the next ones. Rows without a token to be learnt are left out; so
    is the first token of each row, which nothing predicts.
    """
    rows: list[Example] = []
    ids: list[int] = []
    learnt: list[bool] = []

    def flush() -> None:
        nonlocal ids, learnt
        if any(learnt[1:]):
            gap = length - len(ids)
            rows.append((ids + [padding] * gap, learnt + [False] * gap))
        ids, learnt = [], []

    for more, is_learnt in examples:
        if len(ids) + len(more) > length and len(more) <= length:
            flush()
        # nothing in an example predicts its first token
        is_learnt = [False, *is_learnt[1:]]
        for start in range(0, len(more), length):
            part, part_learnt = more[start : start + length], is_learnt[start : start + length]
            if len(ids) + len(part) > length:
                room = length - len(ids)
                ids, learnt = ids + part[:room], learnt + part_learnt[:room]
                part, part_learnt = part[room:], part_learnt[room:]
                flush()
            ids, learnt = ids + part, learnt + part_learnt
            if len(ids) == length:
                flush()
    flush()
    return rows
