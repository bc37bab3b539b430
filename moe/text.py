"""Texts as tokens of a given model: its own tokenizer, or plain UTF-8 bytes where it has none."""

from pathlib import Path

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
NUM_BYTES = 256


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
        text = stream.read(16 * most)
    if any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")):
        from transformers import AutoTokenizer

        return list(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])[:most]
    if vocab_size < NUM_BYTES:
        raise ValueError(
            f"model {folder} has no tokenizer and {vocab_size} tokens, too few to stand for the {NUM_BYTES} bytes"
        )
    return list(text.encode("utf-8"))[:most]
