"""A model whose units come from a bundle: slots for each of its layers, and modules that compute with them.

Shapes: W numbers of a unit.
"""

import threading
from typing import Any

import torch
from torch import nn

from .bundle import Bundle, BundledLayer
from .expert_banks import ExpertBank
from .reader import BundleReader
from .routed_units import bind_experts
from .slots import UnitCounters, UnitSlots
from .unit_linears import bind_linears


class BundledUnits:
    """All units of one model.

    Args:
        bundle: where they are.
        num_slots: units of each layer that stay in memory.
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
        """Let a model's feed-forwards, or its experts, compute with these; their weights may hold no memory."""
        for layer, slots in zip(self.bundle.layers, self.layers, strict=True):
            bind = bind_experts if isinstance(layer.of, ExpertBank) else bind_linears
            bind(model.get_submodule(layer.of.name), self.lock, slots, self.bundle.bounds(layer))

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
    """[rows, W] for what one call may need, in memory that all layers share."""
    count = layer.of.rows_at_once
    return memory[: count * layer.of.unit_bytes].view(layer.of.dtype).view(count, -1)
