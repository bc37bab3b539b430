"""Channels of gpt-oss: messages with a header each, which names the channel and the tool that is called.

Source: the harmony response format of OpenAI (openai/harmony, docs/format.md).
"""

import re
from collections.abc import Sequence

from .channels import Channel, Part, joined
from .stops import longest_beginning

HEADER_ENDS = ("<|message|>",)
BODY_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")
LONGEST_MARK = max(map(len, (*HEADER_ENDS, *BODY_ENDS)))
RECIPIENT = re.compile(r"to=(?:functions\.)?([^\s<]+)")


class HarmonyChannels:
    """Splits `<|channel|>NAME<|message|>TEXT<|end|>` into reasoning (analysis), content (final) and calls.

    Text of the channel commentary is content if it is addressed to nobody. A call is given when it is whole.

    Args:
        is_calling: whether the request has tools; without them what is addressed to one is content.
    """

    def __init__(self, *, is_calling: bool) -> None:
        self._is_calling = is_calling
        self._held = ""
        self._is_header = True
        self._channel: Channel = "content"
        self._recipient = ""

    def put(self, piece: str) -> list[Part]:
        self._held += piece
        parts: list[Part] = []
        while self._step(parts):
            pass
        return joined(parts)

    def end(self) -> list[Part]:
        held, self._held = self._held, ""
        if self._is_header or not held:
            return []
        return [Part(channel="content" if self._channel == "call" else self._channel, text=held)]

    def _step(self, parts: list[Part]) -> bool:
        """Pass one mark, or give out what is certain; whether there may be another mark."""
        mark = _first(self._held, HEADER_ENDS if self._is_header else BODY_ENDS)
        if mark is None:
            if not self._is_header and self._channel != "call":
                keep = longest_beginning(self._held, BODY_ENDS, LONGEST_MARK)
                self._give(parts, self._held[: len(self._held) - keep])
                self._held = self._held[len(self._held) - keep :]
            return False
        before, self._held = self._held.split(mark, 1)
        if self._is_header:
            self._read_header(before)
        else:
            self._give(parts, before)
        self._is_header = not self._is_header
        return True

    def _read_header(self, header: str) -> None:
        found = RECIPIENT.search(header)
        self._recipient = found[1] if found and self._is_calling else ""
        self._channel = "call" if self._recipient else "reasoning" if "analysis" in header else "content"

    def _give(self, parts: list[Part], text: str) -> None:
        if text:
            parts.append(Part(channel=self._channel, text=text, recipient=self._recipient))


def _first(text: str, marks: Sequence[str]) -> str | None:
    """The mark that comes first in a text."""
    found = [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]
    return min(found)[1] if found else None
