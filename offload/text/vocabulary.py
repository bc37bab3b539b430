"""The tokens of a model, seen by those who show them: which are text, which are control tokens, which end an answer."""

from collections.abc import Iterable, Sequence
from typing import Any

from .pieces import TextPieces


class Vocabulary:
    """Text to token ids and back for one model.

    Args:
        tokenizer: of transformers.
        vocab_size: V; larger ids have no embedding.
        end_ids: tokens that end an answer.
        marks: texts of tokens that are shown although the tokenizer counts them as control tokens: the reader of an
            answer looks for them.
    """

    def __init__(
        self, tokenizer: Any, vocab_size: int, end_ids: Iterable[int] = (), marks: frozenset[str] = frozenset()
    ) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        kept = {tokenizer.convert_tokens_to_ids(mark) for mark in marks if mark in tokenizer.get_vocab()}
        self.end_ids = frozenset(end_ids)
        self._hidden = (control_ids(tokenizer).keys() | self.end_ids) - kept

    def encode(self, text: str) -> list[int]:
        """Token ids of a raw text; control tokens that it spells are control tokens.

        Raises:
            ValueError: if the text is no UTF-8, gives no token, or one that the model has no embedding for.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"prompt is not UTF-8 text (character {error.start})") from error
        return self.checked(self.tokenizer(text)["input_ids"])

    def checked(self, token_ids: Sequence[int]) -> list[int]:
        """The ids, if the model knows each.

        Raises:
            ValueError: if there are none, or one is negative or too large.
        """
        if not token_ids:
            raise ValueError("prompt is empty; give at least one token")
        least, most = min(token_ids), max(token_ids)
        if least < 0 or most >= self.vocab_size:
            raise ValueError(
                f"prompt: token {least if least < 0 else most} is none of the model's {self.vocab_size} tokens"
            )
        return list(token_ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens without control tokens; ids that the tokenizer does not know have none."""
        shown = [token_id for token_id in token_ids if token_id not in self._hidden]
        return str(self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def spell(self, token_ids: Sequence[int]) -> str:
        """Text of tokens with their control tokens, as a prompt is seen by the model."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def is_text(self, token_id: int) -> bool:
        """Whether a token is shown."""
        return token_id not in self._hidden

    def pieces(self) -> TextPieces:
        """Text of tokens as they come, for one answer."""
        return TextPieces(self.decode)


def control_ids(tokenizer: Any) -> dict[int, str]:
    """Ids and texts of a tokenizer's control tokens."""
    named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
    added = tokenizer.added_tokens_decoder.items()
    return {**dict(named), **{token_id: token.content for token_id, token in added if token.special}}
