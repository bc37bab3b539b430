"""Grammars of answers: JSON schemas, regular expressions and Lark grammars as masks over tokens, by llguidance."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..engine.request import ConstraintError
from ..text.vocabulary import Vocabulary
from .asks import Grammar

LARGEST_GRAMMAR = 1 << 18
"""Characters of a grammar. Schemas of agents have some thousands; compiling this many takes about a second."""
JSON_STYLE = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n\t]{0,12}"}
"""Spaces between JSON tokens are bounded: a small model may otherwise write nothing else until its last token."""
ANY_OBJECT = '{"type": "object"}'


class Grammars:
    """Compiles grammars for one model.

    Args:
        vocabulary: its tokens; making the tables takes about a second for 150,000 of them. llguidance reads fast
            tokenizers whose decoder it knows; other models are served without grammars.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        from llguidance.hf import from_tokenizer

        ends = sorted(vocabulary.end_ids) or None
        self._vocabulary, self._tables, self._missing = vocabulary, None, ""
        try:
            self._tables = from_tokenizer(vocabulary.tokenizer, n_vocab=_size(vocabulary), eos_token=ends)
        except (TypeError, ValueError) as error:
            self._missing = f"no grammars with this model's tokenizer, which llguidance does not read: {error}"

    def compile(self, grammar: Grammar, begins_after: str = "") -> "GrammarConstraint":
        """A constraint for one answer.

        Args:
            grammar: what the answer must match.
            begins_after: text of the answer after which it must; all before is free.

        Raises:
            ValueError: if the grammar is too large, not valid, or asks for what is not supported; or if there are none
                for this model.
        """
        from llguidance import LLMatcher

        if self._tables is None:
            raise ValueError(self._missing)
        if len(grammar.source) > LARGEST_GRAMMAR:
            raise ValueError(f"the grammar has {len(grammar.source)} characters; at most {LARGEST_GRAMMAR} are read")
        try:
            source = _source(LLMatcher, grammar)
        except ValueError as error:
            raise ValueError(f"the {grammar.kind} cannot be read: {error}") from error
        matcher = LLMatcher(self._tables, source, log_level=0)  # never raises; it says what is wrong
        if not matcher.is_error():
            matcher.compute_bitmask()  # some are too complex for their first token; the client hears it at once
        if matcher.is_error():
            raise ValueError(f"the {grammar.kind} cannot be used: {matcher.get_error().splitlines()[0][:300]}")
        return GrammarConstraint(matcher, self._vocabulary, begins_after)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token, whole characters or not."""
        if self._tables is None:
            return str(self._vocabulary.tokenizer.decode([token_id])).encode()
        return bytes(self._tables.decode_bytes([token_id]))


def _size(vocabulary: Vocabulary) -> int:
    """Tokens that there are tables for: those that the tokenizer and the model both know may be fewer than either."""
    return max(vocabulary.vocab_size, len(vocabulary.tokenizer))


def _source(matcher: Any, grammar: Grammar) -> str:
    if grammar.kind == "json_schema":
        return str(matcher.grammar_from_json_schema(grammar.source, defaults=JSON_STYLE))
    if grammar.kind == "regex":
        return str(matcher.grammar_from_regex(grammar.source))
    return str(matcher.grammar_from_lark(grammar.source))


class GrammarConstraint:
    """The state of one answer in its grammar; the engine's TokenConstraint.

    Args:
        matcher: of llguidance.
        vocabulary: turns tokens into the text in which `begins_after` is looked for.
        begins_after: as in `Grammars.compile`.
    """

    def __init__(self, matcher: Any, vocabulary: Vocabulary, begins_after: str) -> None:
        self._matcher = matcher
        self._pieces = vocabulary.pieces()
        self._awaited, self._before = begins_after, ""
        self._num_words = (vocabulary.vocab_size + 31) // 32
        self._vocab_size = vocabulary.vocab_size

    def allowed_V(self) -> NDArray[np.bool_]:
        """The tokens that may come next; see TokenConstraint.

        Raises:
            ConstraintError: if the grammar has grown too complex.
        """
        if self._awaited:
            return np.ones(self._vocab_size, dtype=bool)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._expect_no_error()
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)

    def accept(self, token_id: int) -> None:
        """The token that was chosen.

        Raises:
            ConstraintError: if the grammar does not allow it, or has grown too complex.
        """
        if self._awaited:
            self._before = (self._before + self._pieces.put(token_id))[-2 * len(self._awaited) - 64 :]
            if self._awaited in self._before:
                self._awaited = ""
            return
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token_id)
            self._expect_no_error()

    def _expect_no_error(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().splitlines()[0][:300]
            raise ConstraintError(f"the grammar of the answer failed: {reason}")
