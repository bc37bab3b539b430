"""The text side of a model folder: its tokenizer, what is wrong with it, and whether a text fits the context."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from moe import ByteText, TokenizerText, save_byte_tokenizer, text_of

from ..checkpoint.gguf.head import has_config_file, is_gguf, read_gguf


class ModelText:
    """Text to token ids and back, as a model folder says.

    Args:
        folder: where the model lies, for messages.
        text: encodes and decodes.
        vocab_size: V; larger ids of a prompt are refused.
    """

    def __init__(self, folder: Path, text: ByteText | TokenizerText, vocab_size: int) -> None:
        self._folder, self._text, self._vocab_size = folder, text, vocab_size

    @property
    def note(self) -> str:
        """What a user should know about the text; empty if there is nothing."""
        if not isinstance(self._text, ByteText):
            return ""
        return f"{self._folder} has no tokenizer: text goes in and comes out as UTF-8 bytes, one token each"

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the tokens that the tokenizer adds."""
        return self._text.encode(text)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of what a user wrote.

        Raises:
            ValueError: if there are none, or the model has no embedding for one of them.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is not UTF-8 text (character {error.start})") from error
        token_ids = self.encode(text)
        if not text:
            raise ValueError("the prompt is empty; give at least one token")
        if not token_ids:
            raise ValueError(
                f"the tokenizer in {self._folder} makes no token of the prompt; is its vocabulary file missing?"
            )
        if max(token_ids) >= self._vocab_size:
            raise ValueError(
                f"the tokenizer in {self._folder} gives token {max(token_ids)}, the model knows {self._vocab_size}; "
                "the tokenizer belongs to another model"
            )
        return token_ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids."""
        return self._text.decode(token_ids)


def open_text(folder: Path) -> ModelText:
    """The text of the model in `folder`, or of a GGUF file.

    Raises:
        ValueError: if its tokenizer cannot be read, or it has none and too few tokens for bytes.
    """
    from ..checkpoint.model_folder import read_config

    vocab_size = int(read_config(folder).get_text_config().vocab_size)
    return ModelText(folder, read_tokenizer(folder, vocab_size), vocab_size)


def read_tokenizer(folder: Path, vocab_size: int) -> ByteText | TokenizerText:
    """The tokenizer of a folder, or bytes without one; of a GGUF file, that beside its config.json, or its own.

    Raises:
        ValueError: if there are tokenizer files and they cannot be read, or there are none and V is too small.
    """
    if is_gguf(folder) and has_config_file(folder) and _has_vocabulary(folder.parent):
        folder = folder.parent
    return _text_of_gguf(folder) if is_gguf(folder) else text_of(folder, vocab_size)


def _has_vocabulary(folder: Path) -> bool:
    """Whether a tokenizer lies beside a GGUF file."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"))


def _text_of_gguf(file: Path) -> TokenizerText:
    from ..checkpoint.gguf.text import tokenizer_of

    return TokenizerText(tokenizer_of(read_gguf(file)))


def open_tokenizer(folder: Path, vocab_size: int) -> Any:
    """The tokenizer of a folder, of transformers; one of bytes for a model of 256 tokens without one.

    Raises:
        ValueError: as `read_tokenizer`.
    """
    text = read_tokenizer(folder, vocab_size)
    if isinstance(text, TokenizerText):
        return text.tokenizer
    from transformers import AutoTokenizer

    with TemporaryDirectory() as place:
        save_byte_tokenizer(Path(place))
        return AutoTokenizer.from_pretrained(place)


def expect_room(prompt_tokens: int, new_tokens: int, context: int) -> None:
    """Refuse a text that is longer than the context that memory is kept for.

    Args:
        prompt_tokens: tokens of the prompt.
        new_tokens: most tokens to generate.
        context: tokens that memory is kept for.

    Raises:
        ValueError: with the numbers, and the option that mends it.
    """
    wanted = prompt_tokens + new_tokens
    if wanted > context:
        raise ValueError(
            f"{prompt_tokens} tokens of prompt and {new_tokens} new ones are {wanted}, and memory is kept for "
            f"{context}; give --context {wanted}"
            + (f" or --max-new-tokens {context - prompt_tokens}" if prompt_tokens < context else "")
        )
