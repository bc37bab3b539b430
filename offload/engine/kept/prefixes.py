"""Kept prefixes in RAM: the tokens of finished requests, the latest ones used first to stay."""

import math
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from .cached import CachedTokens

LEAST_KEPT = 16
"""Shorter sequences are not kept: reading them again takes one step, and each costs a comparison per request."""


class Prefixes:
    """Sequences that later ones may start with, each of one owner.

    Args:
        bytes_per_token: of keys and values in all layers; what a kept sequence takes is counted in such tokens.
    """

    def __init__(self, bytes_per_token: int) -> None:
        self._bytes_per_token = max(bytes_per_token, 1)
        self._kept: list[tuple[str, CachedTokens, int]] = []

    @property
    def num_tokens(self) -> int:
        """Tokens' worth of memory."""
        return sum(tokens for _, _, tokens in self._kept)

    def of(self, owner: str) -> list[CachedTokens]:
        """What is kept of one owner, the least lately used first."""
        return [cached for name, cached, _ in self._kept if name == owner]

    def keep(self, owner: str, cached: CachedTokens) -> None:
        """Keep one more; what it continues is given up."""
        if len(cached) < LEAST_KEPT:
            return
        self._kept = [
            (name, other, tokens)
            for name, other, tokens in self._kept
            if name != owner or other.common(cached.token_ids) < len(other)
        ]
        self._kept.append((owner, cached, math.ceil(cached.nbytes / self._bytes_per_token)))

    def use(self, cached: CachedTokens) -> None:
        """It was of use: it goes last."""
        self._kept.sort(key=lambda kept: kept[1] is cached)

    def drop_oldest(self) -> bool:
        """Give up what was not used for the longest time; whether there was anything."""
        return bool(self._kept) and bool(self._kept.pop(0))


class Tokens(Protocol):
    """Tokens that were computed, in memory or in a file."""

    num_canonical: int
    end_logits_V: object

    def __len__(self) -> int: ...
    def common(self, token_ids: Sequence[int]) -> int: ...
    def reachable(self, length: int) -> int: ...


Kept = TypeVar("Kept", bound=Tokens)


def usable(cached: Tokens, prompt_ids: Sequence[int], piece_tokens: int | None) -> int:
    """Leading tokens of a prompt that need not be read, because they are cached here; the last one has to be.

    All of them are usable where the sequence stands at the end of the same prompt, and its logits are still there.

    Args:
        cached: another sequence of the same owner.
        prompt_ids: the prompt, at least one token.
        piece_tokens: P; only whole pieces of P tokens that were read as such count, so that all that follows has the
            bits of a cold start. None counts any token.
    """
    common = cached.common(prompt_ids)
    if common == len(prompt_ids) == len(cached) and cached.end_logits_V is not None:
        return common
    common = min(common, len(prompt_ids) - 1)
    if piece_tokens is not None:
        common = min(common, cached.num_canonical) // piece_tokens * piece_tokens
    found = cached.reachable(common)
    return found if piece_tokens is None or found % piece_tokens == 0 else 0


def best(candidates: Iterable[Kept], prompt_ids: Sequence[int], piece_tokens: int | None) -> tuple[Kept | None, int]:
    """What saves the most tokens of a prompt, and how many; None and 0 where nothing does."""
    found: tuple[Kept | None, int] = (None, 0)
    for cached in candidates:
        length = usable(cached, prompt_ids, piece_tokens)
        if length > found[1]:
            found = (cached, length)
    return found
