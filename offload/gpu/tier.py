"""The GPU tier of an offloaded model: all layers, and what happened in them."""

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from ..checkpoint.experts import ExpertLayer
from ..compute.matvec import Matvecs
from ..memory.budget import MemoryPlan, describe
from ..ram.counters import Counters
from ..ram.slots import LayerSlots
from .counters import GpuCounters
from .lanes import Lane
from .layer import CpuShare, make_layers
from .rows import KernelExperts, LoopExperts, experts_for
from .split import Splitter
from .step import GpuStep, LookAhead


class GpuTier:
    """Experts on a GPU, above the RAM slots of a runtime.

    Args:
        lane: the device that gives memory, and both of whose streams are used.
        layers: shapes of the experts.
        modules: the experts modules, on the device.
        ram: RAM slots of each layer; pinned here.
        plan: how the GPU's memory is divided; it says how many slots each layer gets.
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
        self._experts = [
            experts_for(module, layer.num_experts, layer.parameters[0].dtype, lane.device)
            for module, layer in zip(modules, layers, strict=True)
        ]
        shares = [self._cpu_share(module, matvecs) for module in modules]
        self._layers = make_layers(lane, layers, plan.num_slots, ram, self._experts, shares)
        pinned = [slots.memory for slots in ram if lane.pin(slots.memory)]
        self.is_pinned = len(pinned) == len(ram)
        # The driver must forget the memory before it is freed, else the next owner of these addresses cannot pin them.
        # The finaliser holds `pinned`, so the memory lives until then. Not at exit: CUDA may be gone by that time.
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
        step = GpuStep(self._layers[layer], self._run_counters, self._counters, x_TD, expert_TK)
        return step.run(weight_TK, look_ahead)

    def hold(self, experts_L: Sequence[Sequence[int]]) -> None:
        """Keep the experts that a plan puts on the GPU in its slots, and read them now.

        Raises:
            OSError: if reading fails.
        """
        for layer, experts in zip(self._layers, experts_L, strict=True):
            layer.hold(experts)

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
            "held_per_layer": [len(layer.slots.held) for layer in self._layers],
            "peak_memory_bytes": self.lane.peak_bytes(),
            "memory": dict(describe(self.plan)),
            "is_pinned": self.is_pinned,
            "computed_by": sorted({_NAMES[type(each)] for each in self._experts}),
            "wire_bytes_per_s": splitter.wire.per_s if splitter and splitter.wire.is_measured else None,
        }

    def reset(self) -> None:
        """Set all counts to 0."""
        self._counters.reset()

    def _cpu_share(self, module: Any, matvecs: Matvecs | None) -> CpuShare | None:
        if matvecs is None or self._splitter is None:
            return None
        return CpuShare(copy.deepcopy(module).to("cpu"), self._splitter, matvecs)


_NAMES: dict[type, str] = {KernelExperts: "kernels", LoopExperts: "torch"}


def _unpin(lane: Lane, pinned: Sequence[torch.Tensor]) -> None:
    for memory in pinned:
        lane.unpin(memory)
