"""From documents to tokens: a Hugging Face tokenizer with the bytes that each token stands for, or plain bytes."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIECE_CHARACTERS = 4 << 20
"""Characters tokenised at a time: the library's own record of a token takes a hundred times its id."""


class Encoder:
    """A tokenizer of transformers, read from a folder or a `tokenizer.json`.

    Args:
        path: where it lies.

    Raises:
        ValueError: if nothing is there, or it cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._tokenizer = _load(path)
        # ids may have holes, so the number of tokens is no bound
        ids = self._tokenizer.get_vocab().values()
        self.vocab_size = max([len(self._tokenizer) - 1, *ids]) + 1
        self.end_token: int | None = self._tokenizer.eos_token_id
        pad = self._tokenizer.pad_token_id
        self.pad_token: int | None = None if pad == self.end_token else pad

    def __call__(self, document: bytes) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Token ids of a document, its end token last, and how many bytes each stands for (the end token for none)."""
        ids: list[NDArray[np.int32]] = []
        sizes: list[NDArray[np.float32]] = []
        for text in _pieces(document.decode("utf-8", "replace")):
            found = self._tokenizer(
                text, add_special_tokens=False, return_offsets_mapping=self._tokenizer.is_fast, verbose=False
            )
            ids.append(np.array(found["input_ids"], np.int32))
            sizes.append(_bytes_of_tokens(text, len(ids[-1]), found.get("offset_mapping")))
        if self.end_token is not None:
            ids.append(np.array([self.end_token], np.int32))
            sizes.append(np.zeros(1, np.float32))
        return np.concatenate(ids), np.concatenate(sizes)


def _pieces(text: str) -> Iterator[str]:
    """The text cut after line breaks where possible, else after blanks, into what is tokenised at a time."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = start + PIECE_CHARACTERS
        cut = max(text.rfind("\n", start, end), -1)
        cut = cut if cut > start else text.rfind(" ", start, end)
        end = cut + 1 if cut > start else end
        yield text[start:end]
        start = end
    yield text[start:]


def _bytes_of_tokens(text: str, count: int, offsets: Any) -> NDArray[np.float32]:
    """UTF-8 bytes per token; they sum up to the text's.

    A token reaches to the start of the next one. Without offsets (tokenizers in Python) all tokens get the mean.
    """
    code = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32)
    width = 1 + (code >= 0x80) + (code >= 0x800) + (code >= 0x10000)
    end = np.concatenate([[0], np.cumsum(width)])
    if not count:
        return np.zeros(0, np.float32)
    if offsets is None:
        return np.full(count, end[-1] / count, np.float32)
    start = np.maximum.accumulate(end[np.array([first for first, _ in offsets])])
    start[0] = 0
    return np.diff(start, append=end[-1]).astype(np.float32)


def save_tokenizer(path: str, folder: Path) -> None:
    """Write a tokenizer's files into a folder."""
    _load(path).save_pretrained(folder)


def expect_tokenizer(path: str | None) -> None:
    """Raises ValueError if nothing is there; reads nothing."""
    if path is not None and not Path(path).exists():
        raise ValueError(f"{path}: no such tokenizer; give a folder that holds one, or a tokenizer.json")


@lru_cache(maxsize=1)
def _load(path: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    from moe import open_tokenizer

    expect_tokenizer(path)
    file = Path(path)
    if file.is_file() and not (file.name == "tokenizer.json" and (file.parent / "tokenizer_config.json").is_file()):
        try:
            return PreTrainedTokenizerFast(tokenizer_file=path)
        except Exception as error:  # the library raises whatever its parser does
            raise ValueError(f"{path}: no tokenizer that transformers reads ({_first_line(error)})") from error
    tokenizer = open_tokenizer(file.parent if file.is_file() else file)
    if not len(tokenizer):
        raise ValueError(f"{path}: the tokenizer has no tokens; give the folder that holds tokenizer.json")
    return tokenizer


def _first_line(error: Exception) -> str:
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), type(error).__name__)
