"""Domains: the folders directly below the folder of a text, and where they lie in the held-out stream."""

from .documents import Document


class Domains:
    """The domains of a text; documents of one folder follow each other.

    Args:
        is_read: whether the text's folders are domains at all; those of the standard library are none.
    """

    def __init__(self, *, is_read: bool) -> None:
        self._is_read = is_read
        self.spans: list[tuple[str, int, int]] = []

    def of(self, document: Document) -> str:
        """The domain of a document, or "" for none."""
        folder, slash, _ = (document.name or "").partition("/")
        return folder if slash and self._is_read else ""

    def note(self, document: Document, start: int, end: int) -> None:
        """A held-out document takes these places of the stream."""
        domain = self.of(document)
        if not domain:
            return
        if self.spans and self.spans[-1][0] == domain:
            start = self.spans.pop()[1]
        self.spans.append((domain, start, end))
