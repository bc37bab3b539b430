"""What a plan must move for the rows of a trace, told from the trace and the plan alone, without torch.

It follows the rules of `moe.parallel.copies` in code of its own, so that equal integers mean something.

Shapes: T rows of a trace, K experts per token, E experts, G processes.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integer = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Moved:
    """One layer's traffic of all processes.

    Args:
        row_GG: rows from each process to each, one per (token, process); the diagonal stays where it is.
        pair_GG: (token, expert) pairs that these rows stand for.
    """

    row_GG: Integer
    pair_GG: Integer

    @property
    def remote_rows(self) -> int:
        """Rows that leave their process."""
        return int(self.row_GG.sum() - np.trace(self.row_GG))

    @property
    def remote_pairs(self) -> int:
        """Rows that would leave their process if each stood for one expert."""
        return int(self.pair_GG.sum() - np.trace(self.pair_GG))

    @property
    def balancedness(self) -> float:
        """Mean over fullest of the pairs that the processes compute."""
        computed_G = self.pair_GG.sum(axis=0)
        return float(computed_G.mean() / max(computed_G.max(), 1))


def forecast(calls: list[list[NDArray[np.int16]]], turns: list[Integer]) -> Moved:
    """The traffic of one layer.

    Args:
        calls: per process, the experts [T, K] of each of its calls; -1 for an empty slot.
        turns: per process, its table [E, G] of turns.
    """
    G = len(turns)
    row_GG, pair_GG = np.zeros((G, G), np.int64), np.zeros((G, G), np.int64)
    for source in range(G):
        order = [turns_in_order(row) for row in turns[source]]
        for expert_TK in calls[source]:
            for token, experts in enumerate(expert_TK.tolist()):
                first = token * len(experts)
                targets = [
                    order[expert][(first + slot) % len(order[expert])]
                    for slot, expert in enumerate(experts)
                    if expert >= 0
                ]
                for target in targets:
                    pair_GG[source, target] += 1
                for target in set(targets):
                    row_GG[source, target] += 1
    return Moved(row_GG=row_GG, pair_GG=pair_GG)


def turns_in_order(turns_G: Integer) -> list[int]:
    """Processes in the order in which they take turns, each spread evenly over the whole."""
    due = [((2 * turn + 1) / (2 * turns), rank) for rank, turns in enumerate(turns_G.tolist()) for turn in range(turns)]
    return [rank for _, rank in sorted(due)]
