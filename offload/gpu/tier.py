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
from .ahead import CopiesAhead
from .counters import GpuCounters
from .lanes import Lane
from .layer import CpuShare, make_layers, rank_in
from .peer import make_peers
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
        peer_slots: slots of each layer in another GPU's memory; empty for none.
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
        peer_slots: Sequence[int] = (),
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
        self.peer_slots = tuple(peer_slots)
        if any(peer_slots):
            self._use_peers(layers, ram)
        self._ahead = CopiesAhead(self._layers, self._counters)
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
        self._ahead.begin(layer)
        if expert_TK.numel() == 0:
            return torch.zeros_like(x_TD)

        def look_further(ids_TK: torch.Tensor) -> None:
            look_ahead(ids_TK)
            self._ahead.advance()

        step = GpuStep(self._layers[layer], self._run_counters, self._counters, x_TD, expert_TK)
        return step.run(weight_TK, look_further)

    def prepare(self, layer: int, experts: Sequence[int]) -> list[int]:
        """A router has decided what a later layer of this pass will use; gives what of it is on no GPU.

        Args:
            layer: whose experts these are.
            experts: most used first.
        """
        self._ahead.plan(layer, experts)
        here = self._layers[layer]
        return [
            expert
            for expert in experts
            if expert not in here.slots and not (here.peer is not None and expert in here.peer)
        ]

    def lent(self, layer: int) -> list[int]:
        """Experts whose RAM slots a copy may still read."""
        return list(self._layers[layer].lent)

    def hold(self, experts_L: Sequence[Sequence[int]]) -> None:
        """Keep the experts that a plan puts on the GPU in its slots, and read them now.

        Raises:
            OSError: if reading fails.
        """
        for layer, experts in zip(self._layers, experts_L, strict=True):
            layer.hold(experts)

    def hold_at_peers(self, experts_L: Sequence[Sequence[int]]) -> None:
        """Keep the experts that a plan puts on other GPUs in their slots there, and read them now.

        Args:
            experts_L: of each layer; nothing at all for a plan without peers.

        Raises:
            OSError: if reading fails.
        """
        for layer, experts in zip(self._layers, experts_L, strict=False):
            if layer.peer is not None:
                layer.hold_at_peer(experts, layer.peer)

    def clear(self) -> None:
        """Forget what the slots hold, once nothing that was queued reads or writes them any more."""
        self.lane.drain()
        self._ahead.clear()
        for layer in self._layers:
            layer.slots.clear()
            layer.ring.clear()
            layer.lent.clear()
            if layer.peer is not None:
                layer.peer.clear()
        self._counters.copies.clear()

    def report(self) -> dict[str, Any]:
        """Hits, copies and memory, JSON-serialisable."""
        splitter = self._splitter
        return {
            **self._counters.summary(),
            "slots_per_layer": list(self.plan.num_slots),
            "held_per_layer": [len(layer.slots.held) for layer in self._layers],
            **self._held_at_peers(),
            "peak_memory_bytes": self.lane.peak_bytes(),
            "memory": dict(describe(self.plan)),
            **({"peer_slots_per_layer": list(self.peer_slots)} if any(self.peer_slots) else {}),
            "is_pinned": self.is_pinned,
            "computed_by": sorted({_NAMES[type(each)] for each in self._experts}),
            "wire_bytes_per_s": splitter.wire.per_s if splitter and splitter.wire.is_measured else None,
        }

    def reset(self) -> None:
        """Set all counts to 0."""
        self._counters.reset()

    def _use_peers(self, layers: Sequence[ExpertLayer], ram: Sequence[LayerSlots]) -> None:
        """Let every layer give experts up to another GPU."""
        ranks = [partial(rank_in, slots) for slots in ram]
        on_gpu = [layer.slots for layer in self._layers]
        peers = make_peers(self.lane, layers, self.peer_slots, ranks, on_gpu)
        for layer, peer in zip(self._layers, peers, strict=True):
            if peer is not None:
                layer.use_peer(peer, self._counters.copies.append)

    def _held_at_peers(self) -> dict[str, list[int]]:
        held = [0 if layer.peer is None else len(layer.peer.held) for layer in self._layers]
        return {"held_at_peers_per_layer": held} if any(held) else {}

    def _cpu_share(self, module: Any, matvecs: Matvecs | None) -> CpuShare | None:
        if matvecs is None or self._splitter is None:
            return None
        return CpuShare(copy.deepcopy(module).to("cpu"), self._splitter, matvecs)


_NAMES: dict[type, str] = {KernelExperts: "kernels", LoopExperts: "torch"}


def _unpin(lane: Lane, pinned: Sequence[torch.Tensor]) -> None:
    for memory in pinned:
        lane.unpin(memory)
