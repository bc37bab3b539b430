"""Calls that a model writes as bare JSON, without marks: answers of Llama 3, and answers that a grammar forces."""

from .channels import Channels, Part


class BareCalls:
    """Holds content back that begins as JSON; at the end it is one part of channel `call`.

    Args:
        inner: splits the text first; its reasoning passes through.
    """

    def __init__(self, inner: Channels) -> None:
        self._inner = inner
        self._held = ""
        self._is_text = False

    def put(self, piece: str) -> list[Part]:
        return [part for found in self._inner.put(piece) for part in self._sort(found)]

    def end(self) -> list[Part]:
        parts = [part for found in self._inner.end() for part in self._sort(found)]
        held, self._held = self._held, ""
        return [*parts, Part(channel="call", text=held)] if held.strip() else parts

    def _sort(self, part: Part) -> list[Part]:
        if part.channel != "content" or self._is_text:
            return [part]
        self._held += part.text
        if not self._held.strip() or self._held.lstrip()[0] in "{[":
            return []
        self._is_text = True
        held, self._held = self._held, ""
        return [Part(channel="content", text=held)]
