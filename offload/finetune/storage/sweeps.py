"""The order in which a run visits layers: up, and down again if there is a backward pass. It says what is read next.

A step visits all layers in the same order, and of each the experts of its visit before: in a backward pass exactly
those of the forward pass, in a forward pass those of the last step, most of which this one needs, too.
"""

from collections.abc import Iterator, Sequence
from math import inf

from .records import Key


class Sweeps:
    """Where a run is, and what it visits after that.

    Args:
        num_layers: MoE layers.
        is_round_trip: whether each sweep up is followed by one down.
        crosses_steps: whether experts are the same at the end of a step as at the beginning of the next one.
    """

    def __init__(self, num_layers: int, *, is_round_trip: bool, crosses_steps: bool) -> None:
        up = list(range(num_layers))
        self._order = up + up[::-1] if is_round_trip else up
        self._crosses_steps = crosses_steps
        self._place = len(self._order) - 1
        self._experts_L: list[Sequence[int]] = [()] * num_layers
        self._wanted_L: list[frozenset[int]] = [frozenset()] * num_layers
        self._visits_until_L = [0] * num_layers

    def visit(self, layer: int, experts: Sequence[int]) -> None:
        """Go on to a layer and some of its experts."""
        count = len(self._order)
        following = [self._order[(self._place + visits) % count] for visits in range(1, count + 1)]
        self._place = (self._place + 1 + following.index(layer)) % count
        self._experts_L[layer], self._wanted_L[layer] = list(experts), frozenset(experts)
        for visits in range(count, 0, -1):
            self._visits_until_L[self._order[(self._place + visits) % count]] = visits

    def visits_until(self, key: Key) -> float:
        """How many visits there are until an expert's own, that one included; infinite if none is expected."""
        layer, expert = key
        return self._visits_until_L[layer] if expert in self._wanted_L[layer] else inf

    def ahead(self) -> Iterator[tuple[int, Key]]:
        """What is visited after the layer that the run is at, each with how many visits there are until then."""
        count = len(self._order)
        last = count if self._crosses_steps else count - 1 - self._place
        for visits in range(1, last + 1):
            layer = self._order[(self._place + visits) % count]
            for expert in self._experts_L[layer]:
                yield visits, (layer, expert)
