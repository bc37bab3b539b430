"""Text of a model as a terminal may show it: nothing in it moves the cursor, changes colours or hides other text.

Source: ECMA-48 (control sequences and control strings).
"""

import re
from typing import Literal

HIDDEN = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
"""C0 and C1 without tab and line feed, and the characters that turn the direction of text."""
IS_HIDDEN = re.compile(HIDDEN)
ESCAPE, CSI = "\x1b", "\x9b"
STRINGS = "\x90\x98\x9d\x9e\x9f"
STRING_LETTERS = "PX]^_"
STRING_ENDS = "\x07\x9c"
State = Literal["text", "escape", "sequence", "string", "string escape"]


class PrintablePieces:
    """Takes control sequences and control characters out of a text, however it is cut into pieces.

    A control string, such as a window title or a link, ends at a line end at the latest: one that is never closed
    shall not swallow the rest of an answer.
    """

    def __init__(self) -> None:
        self._state: State = "text"

    def put(self, piece: str) -> str:
        """What may be shown of a piece."""
        if self._state == "text" and not IS_HIDDEN.search(piece):
            return piece
        return "".join(filter(self._passes, piece))

    def _passes(self, character: str) -> bool:
        """Whether a character is text; follows the sequences."""
        state, self._state = self._state, self._next(character)
        is_line_end = character == "\n" and state != "text"
        return is_line_end or (state == self._state == "text" and not IS_HIDDEN.match(character))

    def _next(self, character: str) -> State:
        if character == "\n":
            return "text"
        if self._state == "string":
            return "text" if character in STRING_ENDS else "string escape" if character == ESCAPE else "string"
        if self._state == "string escape" and character == "\\":
            return "text"
        if character == ESCAPE:
            return "escape"
        if self._state in ("escape", "string escape"):
            return self._after_escape(character)
        if self._state == "sequence":
            return "sequence" if " " <= character <= "?" else "text"
        return "sequence" if character == CSI else "string" if character in STRINGS else "text"

    def _after_escape(self, character: str) -> State:
        if character == "[":
            return "sequence"
        if character in STRING_LETTERS:
            return "string"
        return "escape" if " " <= character <= "/" else "text"


def printable(text: str) -> str:
    """The text without control sequences and control characters."""
    return PrintablePieces().put(text)
