"""The linear layers of a dense feed-forward, computed with the units that may be active.

The layer before the activation chooses. Of units that it does not choose it gives zero, where the model has a number
that is not positive: both become zero by the activation. The layers after it compute with the same units. So every
module around them, and every order of calls, stays the model's own.

Shapes: T tokens, F hidden units, D model width, n chosen units, P units with zeros, W
numbers of a unit.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear, pad

from .bounds import GateBounds
from .slots import UnitSlots, expect_no_gradient


def bind_linears(module: nn.Module, lock: Any, slots: UnitSlots, bounds: GateBounds) -> None:
    """Let the layers of a feed-forward compute with units.

    Args:
        module: the feed-forward.
        lock: of all layers of the model.
        slots: of this one.
        bounds: of its gate.
    """
    of = slots.layer.of
    layers = [getattr(module, part) for part in of.parts]
    units = _Units(lock, slots, bounds, of.width, layers[0].bias)
    for place, layer in enumerate(layers):
        layer.forward = _UnitLinear(units, place, len(layers), layer).forward


@dataclass(eq=False)
class _Units:
    """The chosen units of one feed-forward, from its first layer to its last one."""

    lock: Any
    slots: UnitSlots
    bounds: GateBounds
    width: int
    bias_F: torch.Tensor | None
    unit_n: torch.Tensor | None = None
    weight_PW: torch.Tensor | None = None
    turn: int = -1

    def choose(self, x_TD: torch.Tensor) -> None:
        """What a call may make active."""
        self.unit_n = self.bounds.may_be_active(x_TD, self.bias_F).nonzero()[:, 0]
        self.slots.counters.visited += self.slots.layer.num_units
        self.weight_PW = self.slots.gather([self.unit_n.numpy()])[0]
        self.turn = self.slots.reader.turn

    def part(self, place: int) -> torch.Tensor:
        """[P, D]: rows of one matrix of the chosen units, or columns of the last, then zeros.

        Raises:
            RuntimeError: if another call has taken the memory meanwhile.
        """
        self.slots.expect_turn(self.turn)
        assert self.weight_PW is not None
        return self.weight_PW[:, place * self.width : (place + 1) * self.width]


@dataclass(eq=False)
class _UnitLinear:
    """The forward pass of one of its layers."""

    units: _Units
    place: int
    num_parts: int
    module: Any

    @torch.compiler.disable
    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  torch.nn.Linear calls it so
        """What the layer computes; zero for units that are not chosen.

        Raises:
            RuntimeError: if gradients would need the weights later.
        """
        expect_no_gradient(input)
        units, x_TD = self.units, input.reshape(-1, input.shape[-1])
        with units.lock, torch.no_grad():
            if self.place == 0:
                units.choose(x_TD)
            if self.place < self.num_parts - 1:
                return self._before(x_TD).view(*input.shape[:-1], -1)
            return self._after(x_TD).view(*input.shape[:-1], -1)

    def _before(self, x_TD: torch.Tensor) -> torch.Tensor:
        unit_n, bias_F = self.units.unit_n, self.module.bias
        assert unit_n is not None
        out_TF, part_PD = x_TD.new_zeros(len(x_TD), self.module.out_features), self.units.part(self.place)
        bias_P = None if bias_F is None else pad(bias_F[unit_n], (0, len(part_PD) - len(unit_n)))
        out_TF[:, unit_n] = linear(x_TD, part_PD, bias_P)[:, : len(unit_n)]
        return out_TF

    def _after(self, hidden_TF: torch.Tensor) -> torch.Tensor:
        unit_n = self.units.unit_n
        assert unit_n is not None
        hidden_Tn = hidden_TF[:, unit_n]
        self.units.slots.counters.active += int((hidden_Tn != 0).any(dim=0).sum())
        part_PD = self.units.part(self.place)
        out_TD = pad(hidden_Tn, (0, len(part_PD) - len(unit_n))) @ part_PD
        return out_TD if self.module.bias is None else out_TD + self.module.bias
