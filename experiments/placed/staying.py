"""After which layers tokens come home and where they stay meanwhile: what that moves, told without torch.

It follows the rules of `moe.parallel.staying` in code of its own, so that equal integers mean something.

Shapes: T rows of a trace, L layers, K experts per token, E experts, G processes, C turns of a copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from .forecast import Integer, turns_in_order

DECIDING_ROWS = 2048
"""Rows that decide where tokens come home; each pair of layers is tried on them. Shares of more rows are alike."""


@dataclass(frozen=True, kw_only=True)
class RowBytes:
    """Bytes of what is sent.

    Args:
        there: a hidden state to experts, with ids and weights.
        on: a partial sum to where its token goes on.
        context: keys and values of a token in one layer.
    """

    there: int
    on: int
    context: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Crossed:
    """Rows of one layer from each process to each; the diagonals stay where they are.

    Args:
        there_GG: hidden states to experts.
        on_GG: partial sums to where tokens go on.
        moves: tokens that go on at another process.
    """

    there_GG: Integer
    on_GG: Integer
    moves: int

    def nbytes(self, row: RowBytes) -> int:
        """Bytes between processes."""
        return _off_diagonal(self.there_GG) * row.there + _off_diagonal(self.on_GG) * row.on

    @property
    def rows(self) -> int:
        """Rows between processes, of both kinds."""
        return _off_diagonal(self.there_GG) + _off_diagonal(self.on_GG)


def _off_diagonal(table_GG: Integer) -> int:
    return int(table_GG.sum() - np.trace(table_GG))


@dataclass(frozen=True, kw_only=True, eq=False)
class Turns:
    """The tables of a layer: which copy each process asks, by turns.

    Args:
        rank_GEC: processes in the order of their turns.
        count_GE: entries that count.
    """

    rank_GEC: Integer
    count_GE: Integer

    @classmethod
    def of(cls, turns: Sequence[Integer]) -> Self:
        """From each process's table [E, G] of turns."""
        orders = [[turns_in_order(row) for row in table] for table in turns]
        most = max(len(order) for table in orders for order in table)
        rank_GEC = np.zeros((len(turns), len(turns[0]), most), np.int64)
        for source, table in enumerate(orders):
            for expert, order in enumerate(table):
                rank_GEC[source, expert, : len(order)] = order
        return cls(rank_GEC=rank_GEC, count_GE=np.array([[len(order) for order in table] for table in orders]))


def crossed(
    turns: Turns, expert_TK: NDArray[np.int16], at_T: Integer, home_T: Integer | None
) -> tuple[Crossed, Integer]:
    """One layer: what is sent, and where each token is afterwards.

    Args:
        turns: made by `Turns.of` for this layer.
        expert_TK: experts of each token; -1 for an empty slot.
        at_T: where the tokens are.
        home_T: where they go on; None lets them stay where their experts are.
    """
    (T, K), G = expert_TK.shape, len(turns.count_GE)
    is_there = expert_TK >= 0
    known_TK = np.where(is_there, expert_TK, 0).astype(np.int64)
    # a process numbers the slots of its own tokens, in the order of the trace
    place_T = np.zeros(T, np.int64)
    for rank in range(G):
        place_T[at_T == rank] = np.arange((at_T == rank).sum())
    slot_TK = place_T[:, None] * K + np.arange(K)
    turn_TK = slot_TK % turns.count_GE[at_T[:, None], known_TK]
    rank_TK = turns.rank_GEC[at_T[:, None], known_TK, turn_TK]
    slots_TG = np.stack([((rank_TK == rank) & is_there).sum(axis=1) for rank in range(G)], axis=1)
    if home_T is None:
        has_own = slots_TG[np.arange(T), at_T] > 0
        next_T = np.where(has_own | (slots_TG.sum(axis=1) == 0), at_T, slots_TG.argmax(axis=1))
    else:
        next_T = home_T
    visits_TG = slots_TG > 0
    goes_TG = visits_TG | ((np.arange(G) == next_T[:, None]) & (next_T != at_T)[:, None])
    there_GG, on_GG = np.zeros((G, G), np.int64), np.zeros((G, G), np.int64)
    for rank in range(G):
        there_GG[rank] = goes_TG[at_T == rank].sum(axis=0)
        on_GG[:, rank] = visits_TG[next_T == rank].sum(axis=0)
    return Crossed(there_GG=there_GG, on_GG=on_GG, moves=int((next_T != at_T).sum())), next_T


def passed(
    turns_L: Sequence[Turns], expert_TLK: NDArray[np.int16], home_T: Integer, is_home_L: Sequence[bool]
) -> tuple[list[Crossed], int]:
    """A pass through all layers: what each sends, and how many tokens reach a layer away from home, layers summed.

    Args:
        turns_L: of each layer.
        expert_TLK: ids of a trace; -1 for an empty slot.
        home_T: where tokens start and end.
        is_home_L: after which layers they come home; the last is one.
    """
    at_T, found, away = home_T, [], 0
    for layer, (turns, is_home) in enumerate(zip(turns_L, is_home_L, strict=True)):
        away += len(at_T) if layer and not is_home_L[layer - 1] else 0
        one, at_T = crossed(turns, expert_TLK[:, layer], at_T, home_T if is_home else None)
        found.append(one)
    return found, away


def homecomings(turns_L: Sequence[Turns], expert_TLK: NDArray[np.int16], home_T: Integer, row: RowBytes) -> list[bool]:
    """After which layers tokens come home, so that fewest bytes move, context included; exact for these rows.

    A layer that is reached away from home needs the keys and values of every token on every process.

    Args:
        turns_L, expert_TLK, home_T: as for `passed`.
        row: bytes of what is sent.
    """
    L, G = len(turns_L), len(turns_L[0].count_GE)
    expert_TLK, home_T = expert_TLK[:DECIDING_ROWS], home_T[:DECIDING_ROWS]
    context = len(home_T) * (G - 1) * row.context
    # best[l]: fewest bytes of the layers from l on, from home, and where the tokens come home first
    best: list[tuple[int, int]] = [(0, L)] * (L + 1)
    for start in range(L - 1, -1, -1):
        at_T, spent, found = home_T, 0, []
        for layer in range(start, L):
            spent += context if layer > start else 0
            home, _ = crossed(turns_L[layer], expert_TLK[:, layer], at_T, home_T)
            found.append((spent + home.nbytes(row) + best[layer + 1][0], layer))
            stay, at_T = crossed(turns_L[layer], expert_TLK[:, layer], at_T, None)
            spent += stay.nbytes(row)
        best[start] = min(found)
    is_home_L, layer = [False] * L, 0
    while layer < L:
        is_home_L[best[layer][1]] = True
        layer = best[layer][1] + 1
    return is_home_L
