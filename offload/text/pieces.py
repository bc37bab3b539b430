"""Text of tokens as they come, without half characters, and without decoding the whole text for every token."""

from collections.abc import Callable, Sequence

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
MOST_UNKNOWN = 3
"""Bytes of a character that is not whole yet, at most; each is shown as one U+FFFD, or all together as one."""
LONGEST_WINDOW = 48
"""Tokens that are decoded again for each new one, at most. Text reaches a character's end every few tokens; only
random bytes do not, and then what is held is given out as it is."""


class TextPieces:
    """Turns tokens into text piece by piece; the pieces together are the text of all tokens.

    Only the tokens since the last whole character, and those before it that a decoder needs to see for the space
    between words, are decoded for each token: the work per token does not grow with the text.

    Args:
        decode: text of token ids; bytes that are no characters become U+FFFD.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._seen: list[int] = []
        self._pending: list[int] = []
        self._seen_text = ""
        self._num_shown = 0

    def put(self, token_id: int) -> str:
        """The text that is certain after one more token and was not before; often a word, empty amid a character."""
        self._pending.append(token_id)
        fresh = self._fresh()
        held = len(fresh) - len(fresh.rstrip(UNKNOWN))
        if not held and fresh:
            return self._take(fresh)
        if len(self._pending) > LONGEST_WINDOW:
            return self._take(fresh)
        sure = len(fresh) - min(held, MOST_UNKNOWN)
        piece = fresh[self._num_shown : sure]
        self._num_shown = max(self._num_shown, sure)
        return piece

    def end(self) -> str:
        """What was held back: a character whose last bytes never came becomes U+FFFD."""
        return self._take(self._fresh()) if self._pending else ""

    def _fresh(self) -> str:
        """Text of the pending tokens, after what is shown for good."""
        whole = self._decode([*self._seen, *self._pending])
        return whole[len(self._seen_text) :] if whole.startswith(self._seen_text) else self._decode(self._pending)

    def _take(self, fresh: str) -> str:
        """Show all of it; its tokens become what the next ones are decoded after."""
        piece = fresh[self._num_shown :]
        self._seen, self._pending, self._num_shown = self._pending, [], 0
        self._seen_text = self._decode(self._seen)
        return piece
