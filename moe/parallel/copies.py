"""Copies: which processes hold which experts of a layer, and which copy a token's slot goes to.

Shapes: T tokens, K slots, E experts, G processes, C turns after which the choice among copies repeats.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Copies:
    """Where the experts of one layer are, as the tokens of one process see it.

    Slot number n of a call (tokens in order, K slots each) that names expert e goes to `rank_EC[e, n % turns_E[e]]`.
    That is deterministic, needs no exchange, and spreads tokens evenly (vLLM's `eplb_map_to_physical_and_record`).

    Args:
        rank_EC: int64 processes in the order of their turns; the rest of a row is never read.
        turns_E: int64 entries of each row that count, at least 1.
        local_EG: int64 place of each expert among those of each process; -1 where it has none.
        slots: more than any process has experts; an id that no process knows.
    """

    rank_EC: Tensor
    turns_E: Tensor
    local_EG: Tensor
    slots: int

    @classmethod
    def of(cls, held: Sequence[Sequence[int | None]], share_EG: Tensor) -> Self:
        """The table of one process.

        Args:
            held: per process its experts, in the order of its weights; None for a free place.
            share_EG: int64 turns of each expert's copies on each process; 0 where it has none.

        Raises:
            ValueError: if an expert has no turn, or one on a process that does not hold it.
        """
        E, G = share_EG.shape
        local_EG = torch.full((E, G), -1)
        for rank, experts in enumerate(held):
            for place, expert in enumerate(experts):
                if expert is not None:
                    local_EG[expert, rank] = place
        if (lost := (share_EG.sum(dim=1) == 0).nonzero().flatten().tolist()) or (share_EG > 0)[local_EG < 0].any():
            raise ValueError(f"every expert needs a turn on a process that holds it; without one: {lost}")
        turns = [_interleaved(row) for row in share_EG.tolist()]
        rank_EC = torch.zeros(E, max(map(len, turns)), dtype=torch.int64)
        for expert, ranks in enumerate(turns):
            rank_EC[expert, : len(ranks)] = torch.tensor(ranks)
        return cls(
            rank_EC=rank_EC, turns_E=share_EG.sum(dim=1), local_EG=local_EG, slots=max(map(len, held), default=0)
        )

    def place(self, expert_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Process and place of every slot of a call; process G for ids that are no experts of the layer."""
        (E, G), device = self.local_EG.shape, expert_TK.device
        is_ours_TK = expert_TK < E
        known_TK = expert_TK.clamp(max=E - 1)
        turn_TK = torch.arange(expert_TK.numel(), device=device).view_as(expert_TK) % self.turns_E.to(device)[known_TK]
        rank_TK = self.rank_EC.to(device)[known_TK, turn_TK]
        local_TK = self.local_EG.to(device)[known_TK, rank_TK]
        return torch.where(is_ours_TK, rank_TK, G), torch.where(is_ours_TK, local_TK, self.slots)


def _interleaved(turns_G: Sequence[int]) -> list[int]:
    """Each process as often as it has turns, spread evenly over the row."""
    places = [((turn + 0.5) / turns, rank) for rank, turns in enumerate(turns_G) for turn in range(turns)]
    return [rank for _, rank in sorted(places)]
