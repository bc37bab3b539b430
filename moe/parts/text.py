"""Text to token ids and back: the model's own tokenizer, or plain UTF-8 bytes where a model has none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "chat_template.jinja",
)
VOCABULARY_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")
NUM_BYTES = 256


class ByteText:
    """Bytes as tokens; ids past 255 are specials and show as nothing."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token for token in token_ids if token < NUM_BYTES).decode("utf-8", errors="replace")


class TokenizerText:
    """A Hugging Face tokenizer behind the same two functions."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


def text_of(folder: Path, vocab_size: int) -> ByteText | TokenizerText:
    """How to write and read the tokens of the model in `folder`.

    Raises:
        ValueError: if it has no tokenizer and too few tokens to stand for bytes.
    """
    if any((folder / name).is_file() for name in VOCABULARY_FILES):
        from transformers import AutoTokenizer

        return TokenizerText(AutoTokenizer.from_pretrained(folder))
    if vocab_size < NUM_BYTES:
        raise ValueError(
            f"model {folder} has no tokenizer and {vocab_size} tokens, too few to stand for the {NUM_BYTES} bytes; "
            "put the tokenizer's files beside the weights"
        )
    return ByteText()


def token_rows(folder: Path, vocab_size: int, files: list[Path], length: int, max_tokens: int) -> Tensor:
    """int64 [B, S] from the start of each text, equally many tokens of each; what does not fill a row is left out.

    Args:
        folder: of the model, with its tokenizer if it has one.
        vocab_size: V.
        files: texts.
        length: S; shorter if no text has so many tokens.
        max_tokens: at most so many tokens in all.

    Raises:
        ValueError: if a text is missing or too short, or the model has neither a tokenizer nor a token per byte.
    """
    share = max_tokens // len(files)
    pieces = [_encode(folder, vocab_size, file, share) for file in files]
    length = min(length, *(len(piece) for piece in pieces), length)
    if length < 2:
        raise ValueError("a text has fewer than 2 tokens; give a longer one")
    return torch.cat([torch.tensor(piece[: len(piece) // length * length]).view(-1, length) for piece in pieces])


def _encode(folder: Path, vocab_size: int, file: Path, most: int) -> list[int]:
    if not file.is_file():
        raise ValueError(f"text {file}: no such file")
    with file.open(encoding="utf-8", errors="replace") as stream:
        return text_of(folder, vocab_size).encode(stream.read(16 * most))[:most]
