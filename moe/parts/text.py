"""Text to token ids and back: the model's own tokenizer, or plain UTF-8 bytes where a model has none."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from routing.ground.files import write_json
from routing.ground.plain_text import expect_plain_text

from .tokenizer_files import open_tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
VOCABULARY_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"),
    *("spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
GENERATION_FILE = "generation_config.json"
# the vocabulary of models that read bytes
NUM_BYTES = 256
END_BYTE = 0
"""Between the documents of a byte corpus; text does not hold it, so a byte model's text ends there."""


class ByteText:
    """Bytes as tokens; `decode` leaves ids past 255 out."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token for token in token_ids if token < NUM_BYTES).decode("utf-8", errors="replace")


class TokenizerText:
    """A Hugging Face tokenizer behind the same two functions."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def has_tokenizer(folder: Path) -> bool:
    """Whether a checkpoint folder brings a tokenizer."""
    return any((folder / name).is_file() for name in VOCABULARY_FILES)


def text_of(folder: Path, vocab_size: int) -> ByteText | TokenizerText:
    """How to write and read the tokens of the model in `folder`: its own tokenizer, or bytes if it has 256 tokens.

    Raises:
        ValueError: if its tokenizer cannot be read, or it has none and its tokens cannot be bytes.
    """
    if has_tokenizer(folder):
        return TokenizerText(open_tokenizer(folder))
    if vocab_size != NUM_BYTES:
        raise ValueError(
            f"model {folder} has no tokenizer, and its {vocab_size} tokens are not the {NUM_BYTES} bytes; put the "
            "tokenizer's files (tokenizer.json, tokenizer_config.json) beside the weights"
        )
    return ByteText()


def save_byte_tokenizer(folder: Path) -> None:
    """Write a tokenizer that `AutoTokenizer` loads and whose ids are those of `ByteText`: one per UTF-8 byte.

    Its end-of-text token is byte 0, which separates the documents of a byte corpus.
    """
    vocabulary = {name: byte for byte, name in _byte_names().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(chr(END_BYTE), special=True, normalized=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": chr(END_BYTE),
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)


def _byte_names() -> dict[int, str]:
    """The characters that byte-level vocabularies call the bytes by.

    Printable ones of Latin-1 are called by themselves, the others by the characters from 256 on. The end byte keeps its
    own name, so that it can be a special token: called by character 256, that character in a text would become it.

    Source: Radford et al. 2019 (GPT-2), `bytes_to_unicode` of the released code.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(NUM_BYTES + i) for i, byte in enumerate(others)}
    return names | {END_BYTE: chr(END_BYTE)}


def carry_text_files(folder: Path, out: Path, *, vocab_size: int | None = None) -> None:
    """Copy what turns text into tokens and what ends a text from one checkpoint folder to another.

    Args:
        folder: the checkpoint that `out` was made of.
        out: an unfinished checkpoint folder; a generation config in it is replaced.
        vocab_size: V of a model of ours; with 256 tokens and no tokenizer it gets the byte-level one.
    """
    for name in (*TOKENIZER_FILES, GENERATION_FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    if vocab_size == NUM_BYTES and not has_tokenizer(folder):
        save_byte_tokenizer(out)


def token_rows(folder: Path, vocab_size: int, files: list[Path], length: int, max_tokens: int) -> Tensor:
    """int64 [B, S] from the start of each text, equally many tokens of each; what does not fill a row is left out.

    Args:
        folder: checkpoint folder of the model.
        vocab_size: V; says whether a model without a tokenizer reads bytes.
        files: UTF-8 texts.
        length: S; shorter if a text has fewer tokens.
        max_tokens: bound on B * S.

    Raises:
        ValueError: if a text is missing, too short or none, or the model has neither a tokenizer nor a token per byte.
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
    expect_plain_text(file)
    with file.open(encoding="utf-8-sig", errors="replace") as stream:
        return text_of(folder, vocab_size).encode(stream.read(16 * most))[:most]
