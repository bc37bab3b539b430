"""Stop strings: where a text ends, however it is cut into pieces, and what must wait because one may have begun."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on until one of the stop strings is complete; the stop string is not passed on.

    The text ends at the stop string that is complete first; of those that end at one character, at the longest. The
    result does not depend on how the text is cut into pieces.

    Args:
        stops: the strings; empty ones are refused.

    Raises:
        ValueError: if a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty; leave it out")
        self._stops = tuple(stops)
        self._longest = max(map(len, stops), default=0)
        self._held = ""
        self.found: str | None = None

    def put(self, piece: str) -> str:
        """The text that is certain not to belong to a stop string. Nothing after one was `found`."""
        if self.found is not None or not piece:
            return ""
        if not self._stops:
            return piece
        text = self._held + piece
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at]
        keep = self._may_begin(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def end(self) -> str:
        """What was held back: the text ended before the stop string did."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        return longest_beginning(text, self._stops, self._longest)


def longest_beginning(text: str, strings: Sequence[str], longest: int) -> int:
    """Length of the longest end of a text with which one of the strings begins, the whole string excluded.

    Args:
        text: what came until now.
        strings: what is waited for.
        longest: length of the longest of them.
    """
    for length in range(min(longest - 1, len(text)), 0, -1):
        end = text[len(text) - length :]
        if any(len(string) > length and string.startswith(end) for string in strings):
            return length
    return 0
