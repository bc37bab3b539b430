"""The GPU tier of an offloaded model: all layers, and what happened in them."""

import copy
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from ..checkpoint.experts import ExpertLayer
from ..compute.matvec import Matvecs
from ..memory.budget import MemoryPlan, describe
from ..ram.counters import Counters
from ..ram.slots import LayerSlots
from .budget import ring_slots
from .counters import GpuCounters
from .lanes import Lane
from .rows import KernelExperts, LoopExperts, experts_for
from .slots import LayerGpuSlots, Ring, make_pools
from .split import Splitter
from .step import CpuShare, GpuLayer, GpuStep, LookAhead


class GpuTier:
    """Experts on a GPU, above the RAM slots of a runtime.

    Args:
        lane: the device.
        layers: shapes of the experts.
        modules: the experts modules, on the device.
        ram: RAM slots of each layer; pinned here.
        plan: how the GPU's memory is divided.
        counters: those of the runtime.
        matvecs: products of the CPU's share; None if the GPU computes everything.
    """

    def __init__(
        self,
        lane: Lane,
        layers: Sequence[ExpertLayer],
        modules: Sequence[Any],
        ram: Sequence[LayerSlots],
        plan: MemoryPlan,
        counters: Counters,
        matvecs: Matvecs | None,
    ) -> None:
        self.plan, self.lane, self._run_counters = plan, lane, counters
        self._counters = GpuCounters()
        self._splitter = None if matvecs is None else Splitter()
        experts = [
            experts_for(module, layer.num_experts, layer.parameters[0].dtype, lane.device)
            for module, layer in zip(modules, layers, strict=True)
        ]
        stretches, ring_tensors = make_pools(
            layers,
            [each.biases for each in experts],
            plan.num_slots,
            ring_slots(max(layer.num_experts for layer in layers)),
            lane,
        )
        rings = {id(tensors): Ring(tensors, lane) for tensors in ring_tensors}
        self._layers = [
            GpuLayer(
                lane,
                LayerGpuSlots(stretch, layer.num_experts, partial(_rank, slots), lane),
                rings[id(ring)],
                slots,
                each,
                self._cpu_share(module, matvecs),
            )
            for stretch, ring, layer, slots, each, module in zip(
                stretches, ring_tensors, layers, ram, experts, modules, strict=True
            )
        ]
        self._experts = experts
        pinned = [slots.memory for slots in ram if lane.pin(slots.memory)]
        self.is_pinned = len(pinned) == len(ram)
        # the memory must outlive its registration, whoever goes first
        self.close = weakref.finalize(self, _unpin, lane, pinned)
        self.close.atexit = False

    def forward(
        self,
        layer: int,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        look_ahead: LookAhead,
    ) -> torch.Tensor:
        """The experts' output for one layer, `[T, D]`."""
        if expert_TK.numel() == 0:
            return torch.zeros_like(x_TD)
        step = GpuStep(self._layers[layer], self._run_counters, self._counters)
        return step.run(x_TD, expert_TK, weight_TK, look_ahead)

    def clear(self) -> None:
        """Forget what the slots hold, once nothing that was queued reads or writes them any more."""
        self.lane.drain()
        for layer in self._layers:
            layer.slots.clear()
            layer.ring.clear()
            layer.lent.clear()
        self._counters.copies.clear()

    def report(self) -> dict[str, Any]:
        """Hits, copies and memory, JSON-serialisable."""
        splitter = self._splitter
        return {
            **self._counters.summary(),
            "slots_per_layer": list(self.plan.num_slots),
            "peak_memory_bytes": self.lane.peak_bytes(),
            "memory": dict(describe(self.plan)),
            "is_pinned": self.is_pinned,
            "computed_by": sorted({_NAMES[type(each)] for each in self._experts}),
            "wire_bytes_per_s": splitter.wire.per_s if splitter and splitter.wire.is_measured else None,
        }

    def reset(self) -> None:
        """Start counting anew."""
        self._counters.reset()

    def _cpu_share(self, module: Any, matvecs: Matvecs | None) -> CpuShare | None:
        if matvecs is None or self._splitter is None:
            return None
        return CpuShare(copy.deepcopy(module).to("cpu"), self._splitter, matvecs)


def _rank(ram: LayerSlots, expert: int) -> tuple[float, float]:
    """How much an expert is worth keeping; asks the RAM tier each time, whose policy is a new one after `clear`."""
    return ram.cache.rank(expert)


_NAMES: dict[type, str] = {KernelExperts: "kernels", LoopExperts: "torch"}


def _unpin(lane: Lane, pinned: Sequence[torch.Tensor]) -> None:
    for memory in pinned:
        lane.unpin(memory)
