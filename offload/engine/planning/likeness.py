"""Which of several waiting requests starts next: the one that adds the fewest experts to those of running ones.

What running answers read together is the union of their experts, so a request that uses the same ones costs least.

Source: He et al. 2024 (ExpertFlow), arXiv:2410.17954, section on token scheduling.

Shapes: L MoE layers, E experts.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..request import GenerationRequest

MOST_OVERTAKEN = 4
"""Later requests that may start before one: after that it is next. Not tuned."""
Foresee = Callable[[Sequence[int]], NDArray[np.bool_]]
"""Token ids of a prompt -> [L * E], the experts that it is foreseen to use."""


class Numbered(Protocol):
    """A request on its way; keys rise in the order in which requests come."""

    key: int
    request: GenerationRequest


Each = TypeVar("Each", bound=Numbered)


class LikeFirst:
    """The order of those who wait.

    Args:
        foresee: says what a prompt uses; it is asked once for each request.
    """

    def __init__(self, foresee: Foresee) -> None:
        self._foresee = foresee
        self._uses: dict[int, NDArray[np.bool_]] = {}
        self._overtaken: dict[int, int] = {}

    def order(self, waiting: Iterable[Each], running: Sequence[Numbered]) -> list[Each]:
        """Those who wait, the next one first: who was overtaken often, then who adds the fewest experts."""
        in_turn = list(waiting)
        known = {each.key for each in (*in_turn, *running)}
        self._uses = {key: uses for key, uses in self._uses.items() if key in known}
        self._overtaken = {key: count for key, count in self._overtaken.items() if key in known}
        if not running or len(in_turn) < 2:
            return in_turn
        busy = np.logical_or.reduce([self._uses_of(each) for each in running])

        def rank(sequence: Numbered) -> tuple[bool, int]:
            has_waited = self._overtaken.get(sequence.key, 0) >= MOST_OVERTAKEN
            return not has_waited, 0 if has_waited else int((self._uses_of(sequence) & ~busy).sum())

        return sorted(in_turn, key=rank)

    def note_start(self, started: Numbered, waiting: Iterable[Numbered]) -> int:
        """Count a start; gives how many requests it has overtaken."""
        overtaken = [each.key for each in waiting if each.key < started.key]
        for key in overtaken:
            self._overtaken[key] = self._overtaken.get(key, 0) + 1
        return len(overtaken)

    def _uses_of(self, sequence: Numbered) -> NDArray[np.bool_]:
        if sequence.key not in self._uses:
            self._uses[sequence.key] = self._foresee(sequence.request.prompt_ids)
        return self._uses[sequence.key]
