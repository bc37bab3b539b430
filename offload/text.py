"""Text to token ids and back: the model's own tokenizer, or plain UTF-8 bytes where a model has none."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "tekken.json")
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
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        from transformers import AutoTokenizer

        return TokenizerText(AutoTokenizer.from_pretrained(folder))
    if vocab_size < NUM_BYTES:
        raise ValueError(
            f"model {folder} has no tokenizer and {vocab_size} tokens, too few to stand for the {NUM_BYTES} bytes; "
            "put the tokenizer's files beside the weights"
        )
    return ByteText()
