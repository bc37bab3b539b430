"""Text: which text a run reads, and how; what a description of a run says of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .documents import expect_data
from .tokens import expect_tokenizer

if TYPE_CHECKING:
    from ..corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class Text:
    """Which text is read, and how; see `load_corpus`.

    Args:
        data: a file, a table or a folder; None for the standard library's sources.
        column: the text column of tables.
        tokenizer: folder of a Hugging Face tokenizer, or its `tokenizer.json`; None reads bytes.
        text_fingerprint: `Corpus.fingerprint` that the text must have; None for any.
    """

    data: str | None = None
    column: str = "text"
    tokenizer: str | None = None
    text_fingerprint: str | None = None

    def expect_there(self) -> None:
        """Raises ValueError if there is no such text or tokenizer; reads nothing."""
        expect_data(self.data)
        expect_tokenizer(self.tokenizer)

    def load(self) -> "Corpus":
        """Read it.

        Raises:
            ValueError: if it cannot be read, or is another text than the fingerprint says.
        """
        from ..corpus import load_corpus

        corpus = load_corpus(self.data, column=self.column, tokenizer=self.tokenizer)
        if self.text_fingerprint not in (None, corpus.fingerprint):
            raise ValueError(
                f"{corpus.source} is not the text of this description: its fingerprint is {corpus.fingerprint}, "
                f"not {self.text_fingerprint}; give it that text, or leave text_fingerprint out"
            )
        return corpus
