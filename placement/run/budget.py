"""Budget: how long a solver may run, what it has found so far, whom it tells."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Integer = NDArray[np.int64]
Float = NDArray[np.float64]
Progress = Callable[[str, float], None]


@dataclass(kw_only=True)
class Found:
    """What a solve has found so far: the best complete map, and bounds per layer that were proved."""

    incumbent_LP: Integer | None = None
    proved_L: Float | None = None


@dataclass(kw_only=True)
class Budget:
    """Time, randomness and processes of one solve.

    Args:
        time_limit_s: wall time from now.
        seed: for every random choice.
        processes: worker processes for layers; 1 stays in this process.
        progress: called with a phase and the share of it that is done.
        balance_floor: balancedness to expect on unseen data, or None.
        blocks: how often the map of what is searched is repeated in the map of the whole problem.
        found: what has been found; a part of the budget finds into the same place.
    """

    time_limit_s: float = 60.0
    seed: int = 0
    processes: int = 1
    progress: Progress | None = None
    balance_floor: float | None = None
    blocks: int = 1
    found: Found = field(default_factory=Found)
    began: float = field(default_factory=time.monotonic)

    @property
    def deadline(self) -> float:
        """`time.monotonic()` at which to stop; the same clock in every process of the machine."""
        return self.began + self.time_limit_s

    @property
    def left_s(self) -> float:
        """Seconds until the deadline, at least 0."""
        return max(0.0, self.deadline - time.monotonic())

    def part(self, share: float) -> "Budget":
        """A budget that ends after that share of the time left; what it finds is found here, too."""
        return replace(self, time_limit_s=time.monotonic() - self.began + share * self.left_s)

    def trial(self, share: float) -> "Budget":
        """The same for searches of another problem, such as half of the data: their maps are not kept or told of."""
        return replace(self.part(share), found=Found(), progress=None)

    def offer(self, map_LP: Integer) -> None:
        """Keep a complete map that is the best so far; Ctrl-C returns it."""
        self.found.incumbent_LP = np.tile(map_LP, (1, self.blocks))

    def prove(self, layer: int, bound: float, layers: int) -> None:
        """Keep a valid lower bound on one layer's objective; the largest one counts.

        Args:
            layer: index among the problem's layers.
            bound: in units of the objective, for the worst scenario.
            layers: L, the layers that share the time.
        """
        if self.found.proved_L is None:
            self.found.proved_L = np.full(layers, -np.inf)
        self.found.proved_L[layer] = max(self.found.proved_L[layer], bound)

    def tell(self, phase: str, share: float) -> None:
        """Report the share of a phase that is done, 0 to 1."""
        if self.progress is not None:
            self.progress(phase, share)
