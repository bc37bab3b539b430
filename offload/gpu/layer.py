"""One layer with a GPU tier: where its experts may lie, who computes them, and what the CPU does of it.

Shapes: E experts, n rows of one expert, D model width, F expert width.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from ..checkpoint.experts import ExpertLayer
from ..compute.matvec import Matvecs
from ..ram.slots import LayerSlots
from ..store.reading import Ticket, next_landed
from .lanes import Copy, Lane
from .peer import PeerSlots
from .plan.budget import ring_slots
from .rows import KernelExperts, LoopExperts, one_expert
from .slots import LayerGpuSlots, Ring, make_pools
from .split import Splitter

Experts = KernelExperts | LoopExperts


class CpuShare:
    """What the CPU computes of a layer's misses.

    Args:
        module: the experts module, on the CPU: its flags, gate and biases are used, not its weights.
        splitter: decides which misses; shared by all layers, so that they learn one rate.
        matvecs: products for experts with a single row.
    """

    def __init__(self, module: Any, splitter: Splitter, matvecs: Matvecs) -> None:
        self._module, self.splitter, self._matvecs = module, splitter, matvecs

    def compute(self, x_nD: torch.Tensor, weights: Mapping[str, torch.Tensor], expert: int) -> torch.Tensor:
        """One expert's outputs `[n, D]` from its input rows, with the weights in its RAM slot."""
        return one_expert(self._module, x_nD, weights, expert, self._multiply)

    def _multiply(self, x_nD: torch.Tensor, weight_DF: torch.Tensor) -> torch.Tensor:
        if len(x_nD) == 1:
            out_1F = x_nD.new_empty(1, weight_DF.shape[1])
            if self._matvecs.multiply(x_nD, (weight_DF.t(),), (out_1F,)):
                return out_1F
        return torch.mm(x_nD, weight_DF)


class GpuLayer:
    """One layer: its slots on the GPU and in RAM, and how it is computed.

    Args:
        lane: the device that owns `slots` and `ring`.
        slots: GPU slots whose experts stay from call to call.
        ring: GPU slots to pass through; layers of the same shapes share them.
        ram: RAM slots, which every expert passes on its way to the GPU.
        experts: how experts are computed on the GPU.
        cpu: what is computed on the CPU, or None for nothing.
    """

    def __init__(
        self,
        lane: Lane,
        slots: LayerGpuSlots,
        ring: Ring,
        ram: LayerSlots,
        experts: Experts,
        cpu: CpuShare | None,
    ) -> None:
        self.lane, self.slots, self.ring, self.ram, self.experts, self.cpu = lane, slots, ring, ram, experts, cpu
        self.peer: PeerSlots | None = None
        self.lent: dict[int, Copy] = {}
        """Expert -> the copy that may still read its RAM slot. It outlives a call: the host runs ahead of the GPU."""

    def use_peer(self, peer: PeerSlots, note: Callable[[Copy], None]) -> None:
        """From now on, what the GPU gives up goes to another GPU.

        Args:
            peer: its slots there.
            note: told each copy.
        """

        def leave(expert: int, slot: int) -> None:
            here = {name: tensor[slot] for name, tensor in self.slots.tensors.items()}
            if pairs := peer.keep(expert, here):
                # behind the copy that brought the expert, before the one that overwrites it: all are on one stream
                note(self.lane.copy_in(pairs, None))

        self.peer, self.slots.leaving = peer, leave

    def hold(self, experts: Sequence[int]) -> None:
        """Keep experts in GPU slots for good; they are read through RAM slots, which are free afterwards.

        Args:
            experts: at most as many as there are GPU slots; nothing else is in a slot yet.

        Raises:
            OSError: if reading fails.
        """
        self.slots.held = frozenset(experts)
        self._read_through_ram(experts, self._bring)
        self.slots.publish()

    def hold_at_peer(self, experts: Sequence[int], peer: PeerSlots) -> None:
        """Keep experts in the slots of another GPU for good; they are read as above.

        Args:
            experts: at most as many as there are slots; nothing else is in a slot yet.
            peer: where.

        Raises:
            OSError: if reading fails.
        """
        peer.held = frozenset(experts)
        self._read_through_ram(experts, lambda expert: self.lane.copy_in(peer.place(expert, self.ram[expert]), None))

    def _read_through_ram(self, experts: Sequence[int], bring: Callable[[int], Copy]) -> None:
        """Read experts, as many at a time as RAM has slots for, and copy each where it belongs."""
        for start in range(0, len(experts), self.ram.num_slots):
            landed: SimpleQueue[Ticket] = SimpleQueue()
            some = experts[start : start + self.ram.num_slots]
            for expert in some:
                self.ram.start_read(expert, (), landed)
            for _ in some:
                expert = next_landed(landed, "an expert that the plan holds on a GPU").expert
                bring(expert).wait()
                self.ram.release(expert)

    def _bring(self, expert: int) -> Copy:
        """Queue the copy of an expert into a slot here, from its RAM slot."""
        slot = self.slots.take(expert, ())
        copy = self.lane.copy_in(self.slots.pairs(slot, self.ram[expert]), None)
        self.lane.compute_after(copy)
        self.lane.launch(partial(self.slots.set_biases, slot, self.experts.biases, expert))
        return copy


def make_layers(
    lane: Lane,
    layers: Sequence[ExpertLayer],
    num_slots_L: Sequence[int],
    ram_L: Sequence[LayerSlots],
    experts_L: Sequence[Experts],
    shares_L: Sequence[CpuShare | None],
) -> list[GpuLayer]:
    """Allocate all GPU slots, and give each layer its own and the ring of its shapes.

    Args:
        lane: the device that gives the memory.
        layers: shapes of the experts.
        num_slots_L: GPU slots of each layer that keep their experts, at least 1.
        ram_L, experts_L, shares_L: RAM slots, computation and CPU share of each layer.
    """
    ring = ring_slots(max(layer.num_experts for layer in layers))
    stretches, ring_tensors = make_pools(layers, [experts.biases for experts in experts_L], num_slots_L, ring, lane)
    # by identity: layers of the same shapes were given the same tensors, and have to share what is known of them too
    rings = {id(tensors): Ring(tensors, lane) for tensors in ring_tensors}
    return [
        GpuLayer(
            lane,
            LayerGpuSlots(stretch, layer.num_experts, partial(rank_in, ram), lane),
            rings[id(ring_of_layer)],
            ram,
            experts,
            share,
        )
        for stretch, ring_of_layer, layer, ram, experts, share in zip(
            stretches, ring_tensors, layers, ram_L, experts_L, shares_L, strict=True
        )
    ]


def rank_in(ram: LayerSlots, expert: int) -> tuple[float, float]:
    """How much an expert is worth keeping; asks the RAM tier each time, whose policy is a new one after `clear`."""
    return ram.cache.rank(expert)
