"""The experts of a layer, computed with the units that may be active for the tokens that visit them.

Each expert chooses its units, and those of as many experts as the memory of one read holds come together: for one token
these are all that it visits. Sums over a token's experts run in the order of transformers.

Shapes: T tokens, K experts per token, E experts, F hidden units of one, D model width, N = T K routed rows sorted by
expert, t rows of one expert, n units, P units with zeros, W numbers of a unit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from ..compute.routed_rows import ExpertSpans
from .bounds import GateBounds
from .expert_banks import ExpertBank, hidden_units
from .slots import UnitSlots, expect_no_gradient
from .unit_layer import rounded

Turn = list[tuple[int, torch.Tensor]]
"""Experts that are computed together, each with the numbers of its chosen units."""


def bind_experts(module: nn.Module, lock: Any, slots: UnitSlots, bounds: GateBounds) -> None:
    """Let an experts module compute with units.

    Args:
        module: the experts module; it needs no weights from now on.
        lock: of all layers of the model.
        slots: of this one.
        bounds: of the gates of its experts below each other.
    """
    bank = slots.layer.of
    assert isinstance(bank, ExpertBank)
    module.forward = _RoutedUnits(lock, slots, bank, bounds.split(bank.expert_units), module).forward


@dataclass(eq=False)
class _RoutedUnits:
    """The forward pass of one experts module."""

    lock: Any
    slots: UnitSlots
    bank: ExpertBank
    bounds_E: list[GateBounds]
    module: Any

    @torch.compiler.disable
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """[T, D], the weighted sum over each token's experts; names are those of transformers' experts interface.

        Raises:
            RuntimeError: if gradients would need the weights later.
        """
        expect_no_gradient(hidden_states, top_k_weights)
        with self.lock, torch.no_grad():
            spans = ExpertSpans(top_k_index, self.bank.num_experts)
            if not spans.of:
                return torch.zeros_like(hidden_states)
            x_ND = hidden_states[spans.token_N].to(self.bank.dtype)
            out_ND = torch.zeros_like(x_ND)
            for turn in self._turns(spans.of, x_ND):
                self._compute(turn, spans.of, x_ND, out_ND)
            return spans.combine(out_ND, top_k_weights, hidden_states.dtype)

    def _turns(self, spans: Mapping[int, tuple[int, int]], x_ND: torch.Tensor) -> Iterator[Turn]:
        """All visited experts and what they choose, as many at a time as the memory of one read holds."""
        turn: Turn = []
        room = self.slots.most_rows
        for expert, (start, stop) in spans.items():
            unit_n = self.bounds_E[expert].may_be_active(x_ND[start:stop], None).nonzero()[:, 0]
            if rounded(len(unit_n)) > room:
                yield turn
                turn, room = [], self.slots.most_rows
            turn.append((expert, unit_n))
            room -= rounded(len(unit_n))
        yield turn

    def _compute(
        self, turn: Turn, spans: Mapping[int, tuple[int, int]], x_ND: torch.Tensor, out_ND: torch.Tensor
    ) -> None:
        """Write what some experts give, with their units in memory at once."""
        pieces = [(expert * self.bank.expert_units + chosen_n).numpy() for expert, chosen_n in turn]
        self.slots.counters.visited += len(turn) * self.bank.expert_units
        gathered = self.slots.gather(pieces)
        number = self.slots.reader.turn
        for (expert, _), weight_PW in zip(turn, gathered, strict=True):
            start, stop = spans[expert]
            out_ND[start:stop] = self._expert(x_ND[start:stop], weight_PW)
        self.slots.expect_turn(number)

    def _expert(self, x_tD: torch.Tensor, weight_PW: torch.Tensor) -> torch.Tensor:
        *row_PD, column_PD = weight_PW.split(self.bank.width, dim=1)
        hidden_tP = hidden_units(self.module, [linear(x_tD, each_PD) for each_PD in row_PD])  # of zeros it is zero
        self.slots.counters.active += int((hidden_tP != 0).any(dim=0).sum())
        return hidden_tP @ column_PD
