"""Feed-forwards of a model whose units come from a bundle: their linear layers compute with what may be active.

The layer before the activation chooses. Of units that it does not choose it gives zero, where the model has a number
that is not positive: both become zero by the activation. The layers after it compute with the same units. So every
module around them, and every order of calls, stays the model's own.

Shapes: T tokens, F hidden units, D model width, n chosen units, W numbers of a unit.
"""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from .bounds import GateBounds
from .bundle import Bundle, BundledLayer, BundleReader
from .slots import UnitCounters, UnitSlots


class BundledUnits:
    """All feed-forwards of one model.

    Args:
        bundle: their units.
        num_slots: units of each that stay in memory.
        num_threads: reads in flight at most.
    """

    def __init__(self, bundle: Bundle, num_slots: list[int], num_threads: int) -> None:
        self.bundle = bundle
        self.reader = BundleReader(bundle, num_threads)
        self.lock = threading.RLock()
        work = torch.empty(bundle.work_bytes, dtype=torch.uint8)
        self.layers = [
            UnitSlots(layer, self.reader, count, _work(layer, work))
            for layer, count in zip(bundle.layers, num_slots, strict=True)
        ]

    def bind(self, model: nn.Module) -> None:
        """Let a model's feed-forwards compute with these; their weights may hold no memory."""
        for layer, slots in zip(self.bundle.layers, self.layers, strict=True):
            module = model.get_submodule(layer.of.name)
            parts = [getattr(module, part) for part in layer.of.parts]
            units = _Units(self.lock, slots, self.bundle.bounds(layer), layer.of.width, parts[0].bias)
            for place, part in enumerate(parts):
                part.forward = _UnitLinear(units, place, len(parts), part).forward

    def report(self) -> dict[str, Any]:
        """Counts, JSON-serialisable; `exactness` is that of sums whose zeros are left out."""
        total = {name: sum(getattr(each.counters, name) for each in self.layers) for name in vars(UnitCounters())}
        return {
            "exactness": "the model's terms in another order",
            **total,
            "bytes_read": self.reader.bytes_read,
            "slots_per_layer": [each.report()["slots"] for each in self.layers],
            "units_per_layer": [layer.num_units for layer in self.bundle.layers],
        }

    def reset(self) -> None:
        """Set all counts to 0."""
        self.reader.bytes_read = 0
        for each in self.layers:
            each.counters = UnitCounters()

    def close(self) -> None:
        """Stop reading; the model cannot run afterwards."""
        with self.lock:
            self.reader.close()


def _work(layer: BundledLayer, memory: torch.Tensor) -> torch.Tensor:
    """[F, W] in memory that all feed-forwards share."""
    return memory[: layer.of.nbytes].view(layer.of.dtype).view(layer.num_units, -1)


@dataclass(eq=False)
class _Units:
    """The chosen units of one feed-forward, from its first layer to its last one."""

    lock: Any
    slots: UnitSlots
    bounds: GateBounds
    width: int
    bias_F: torch.Tensor | None
    unit_n: torch.Tensor | None = None
    weight_nW: torch.Tensor | None = None
    turn: int = -1

    def choose(self, x_TD: torch.Tensor) -> None:
        """What a call may make active."""
        self.unit_n = self.bounds.may_be_active(x_TD, self.bias_F).nonzero()[:, 0]
        self.weight_nW = self.slots.gather(self.unit_n.numpy())
        self.turn = self.slots.reader.turn

    def part(self, place: int) -> torch.Tensor:
        """[n, D]: rows of one matrix of the chosen units, or columns of the last.

        Raises:
            RuntimeError: if another call has taken the memory meanwhile.
        """
        if self.weight_nW is None or self.turn != self.slots.reader.turn:
            raise RuntimeError("a model with bundled units was called within another of its calls; call it in turn")
        return self.weight_nW[:, place * self.width : (place + 1) * self.width]


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
        if torch.is_grad_enabled() and input.requires_grad:
            raise RuntimeError("gradients do not pass through bundled units; run the model under torch.no_grad()")
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
        out_TF = x_TD.new_zeros(len(x_TD), self.module.out_features)
        out_TF[:, unit_n] = linear(x_TD, self.units.part(self.place), None if bias_F is None else bias_F[unit_n])
        return out_TF

    def _after(self, hidden_TF: torch.Tensor) -> torch.Tensor:
        unit_n = self.units.unit_n
        assert unit_n is not None
        hidden_Tn = hidden_TF[:, unit_n]
        self.units.slots.counters.active += int((hidden_Tn != 0).any(dim=0).sum())
        out_TD = hidden_Tn @ self.units.part(self.place)
        return out_TD if self.module.bias is None else out_TD + self.module.bias
