"""The channels of an answer as it comes: what the user reads, the reasoning before it, calls of tools."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from .stops import longest_beginning

Channel = Literal["content", "reasoning", "call"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of one channel.

    Args:
        channel: whose text it is.
        text: the piece; of a call, the whole text between its marks.
        recipient: name of the tool that a call is addressed to, where it stands outside the text.
    """

    channel: Channel
    text: str
    recipient: str = ""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A stretch of an answer between two marks.

    Args:
        channel: what the stretch is.
        opening: mark before it.
        closing: mark after it; empty if it reaches to the answer's end.
    """

    channel: Channel
    opening: str
    closing: str


class Channels(Protocol):
    """Splits a text; pieces come in, parts go out."""

    def put(self, piece: str) -> list[Part]: ...

    def end(self) -> list[Part]: ...


class MarkedChannels:
    """Channels of models that put marks such as `<think>` and `</think>` around a stretch; all else is content.

    A mark may come in any number of pieces. Calls are given whole, when their closing mark is there; one that the
    answer's end cuts off is given as content, for half a call is none.

    Args:
        regions: the stretches, with different opening marks.
        inside: the stretch that the prompt has opened already, or None.
    """

    def __init__(self, regions: Sequence[Region], inside: Region | None = None) -> None:
        self._regions, self._inside = tuple(regions), inside
        self._held = ""
        self._is_start = inside is not None

    def put(self, piece: str) -> list[Part]:
        self._held += piece
        return joined(self._split())

    def end(self) -> list[Part]:
        held, region = self._held, self._inside
        self._held = ""
        if region is None:
            return _part("content", held)
        if region.channel == "call":
            return _part("call", held) if not region.closing else _part("content", region.opening + held)
        return _part(region.channel, held.rstrip())

    def _split(self) -> Iterator[Part]:
        while True:
            if self._is_start:  # line ends after a mark belong to the mark
                self._held = self._held.lstrip()
                self._is_start = not self._held
            marks = self._awaited()
            found = [(at, -len(mark), region) for mark, region in marks if (at := self._held.find(mark)) >= 0]
            if not found:
                break
            at, length, region = min(found, key=lambda entry: entry[:2])
            yield from self._before_mark(self._held[:at])
            self._held = self._held[at - length :]
            self._inside, self._is_start = region, True
        if self._inside is None or self._inside.channel != "call":
            yield from self._certain([mark for mark, _ in marks])

    def _awaited(self) -> list[tuple[str, Region | None]]:
        """Marks that would end the present stretch, each with the stretch that begins after it."""
        if self._inside is None:
            return [(region.opening, region) for region in self._regions]
        return [(self._inside.closing, None)] if self._inside.closing else []

    def _before_mark(self, text: str) -> list[Part]:
        region = self._inside
        if region is not None and region.channel == "call":
            return [Part(channel="call", text=text.strip())]
        return _part("content" if region is None else region.channel, text.rstrip())

    def _certain(self, marks: list[str]) -> list[Part]:
        """What cannot belong to a mark any more; spaces before a mark belong to it."""
        text = self._held
        keep = longest_beginning(text, marks, max(map(len, marks), default=0))
        if marks:
            keep = len(text) - len(text[: len(text) - keep].rstrip())
        self._held = text[len(text) - keep :]
        channel = "content" if self._inside is None else self._inside.channel
        return _part(channel, text[: len(text) - keep])


def _part(channel: Channel, text: str) -> list[Part]:
    return [Part(channel=channel, text=text)] if text else []


def joined(parts: Iterable[Part]) -> list[Part]:
    """Neighbours of one channel as one part; calls stay apart."""
    merged: list[Part] = []
    for part in parts:
        if merged and part.channel == merged[-1].channel != "call":
            merged[-1] = Part(channel=part.channel, text=merged[-1].text + part.text)
        else:
            merged.append(part)
    return merged
