"""Expert slots in GPU memory: one tensor per parameter that kernels index by slot, and which expert is in which.

Shapes: E experts, C slots.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch

from ..checkpoint.experts import ExpertLayer
from .lanes import Copy, Lane, Mark

Tensors = Mapping[str, torch.Tensor]


class SlotMap:
    """Expert -> slot as it was at one moment, on the host and, once a kernel asks for it, on the device."""

    def __init__(self, slot_of: Mapping[int, int], num_experts: int, lane: Lane) -> None:
        self.slot_of = dict(slot_of)
        self._num_experts, self._lane = num_experts, lane
        self._slot_E: torch.Tensor | None = None

    @property
    def slot_E(self) -> torch.Tensor:
        """int32, -1 for experts without a slot; ask for it only in launched work."""
        if self._slot_E is None:
            host_E = self._lane.host((self._num_experts,), torch.int32).fill_(-1)
            if self.slot_of:
                host_E[list(self.slot_of)] = torch.tensor(list(self.slot_of.values()), dtype=torch.int32)
            # on the stream that the kernels run on, so they need not wait for it
            self._slot_E = host_E.to(self._lane.device, non_blocking=True)
        return self._slot_E


class GpuSlots:
    """A stretch of a pool.

    Args:
        tensors: parameter -> `[C, ...]`.
    """

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors
        self.num_slots = len(next(iter(tensors.values())))

    def pairs(self, slot: int, weights: Tensors) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(target, source) for every parameter of an expert that comes into a slot."""
        return [(self.tensors[name][slot], source) for name, source in weights.items()]

    def set_biases(self, slot: int, biases: Tensors, expert: int) -> None:
        """Kernels index biases by slot, too; these are on the device already."""
        for name, bias_E in biases.items():
            self.tensors[name][slot].copy_(bias_E[expert])


class LayerGpuSlots(GpuSlots):
    """The slots of one layer, which keep their experts until the policy gives them up.

    Args:
        tensors: parameter -> `[C, ...]`.
        num_experts: E, the length of the map that kernels read.
        rank: how much an expert is worth keeping: the RAM tier's policy, which sees every token.
        lane: gives marks of the compute stream.
    """

    def __init__(self, tensors: Tensors, num_experts: int, rank: Callable[[int], Any], lane: Lane) -> None:
        super().__init__(tensors)
        self._num_experts, self._rank, self._lane = num_experts, rank, lane
        self.leaving: Callable[[int, int], None] | None = None
        """Told expert and slot before the expert is given up for another."""
        self.held: frozenset[int] = frozenset()
        """Experts that a plan keeps here: they are not given up, and come back first after `clear`."""
        self.clear()

    def clear(self) -> None:
        """Forget what the slots hold; nothing that is queued may read or write them."""
        self._slot_of: dict[int, int] = {}
        self._coming: dict[int, Copy] = {}
        """Experts that are copied before the layer is asked; `map` does not have them."""
        self._free = list(range(self.num_slots))[::-1]
        self.map = SlotMap({}, self._num_experts, self._lane)
        self.released: Mark | None = None
        """After this, nothing reads what the slots held before the present call."""

    def __contains__(self, expert: int) -> bool:
        return expert in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def room_beside(self, needed: Collection[int]) -> int:
        """Slots that other experts could take while these, and those that are held, stay."""
        return self.num_slots - sum(expert in needed or expert in self.held for expert in self._slot_of)

    def worth(self, expert: int) -> tuple[bool, Any]:
        """How much an expert is worth a slot: held ones more than all others."""
        return expert in self.held, self._rank(expert)

    def take(self, expert: int, pinned: Collection[int]) -> int:
        """A slot for an expert that comes; gives up the one that is worth least, never one in `pinned` or held.

        The slot may be written once `released` is reached: earlier calls are the last that read the expert given up.
        This call has no rows for it, else it would be in `pinned`.
        """
        if not self._free:
            others = (other for other in self._slot_of if other not in pinned and other not in self.held)
            victim = min(others, key=self._rank)
            if self.leaving is not None:
                self.leaving(victim, self._slot_of[victim])
            self.drop(victim)
        self._slot_of[expert] = slot = self._free.pop()
        return slot

    def take_ahead(self, expert: int, pinned: Collection[int], copy_into: Callable[[int], Copy]) -> None:
        """Let an expert come before the layer is asked; whoever it replaces is not on the GPU any more.

        Args:
            pinned: experts that must stay.
            copy_into: queues its copy into a slot.
        """
        self._coming[expert] = copy_into(self.take(expert, pinned))
        self._show({other: slot for other, slot in self._slot_of.items() if other not in self._coming})

    def arrivals(self) -> dict[int, tuple[int, Copy]]:
        """Slot and copy of each expert that was let come; the caller lets what it launches wait for the copies."""
        found = {expert: (self._slot_of[expert], copy) for expert, copy in self._coming.items()}
        self._coming.clear()
        return found

    def drop(self, expert: int) -> None:
        """Forget an expert."""
        self._coming.pop(expert, None)
        self._free.append(self._slot_of.pop(expert))

    def publish(self) -> None:
        """Let the next call see which experts the slots hold, and take slots as soon as this call's work is done."""
        self._show(self._slot_of)
        self.released = self._lane.mark()

    def _show(self, slot_of: Mapping[int, int]) -> None:
        # a new map only when something changed, because each has to be copied to the device
        if self.map.slot_of != slot_of:
            self.map = SlotMap(slot_of, self._num_experts, self._lane)


class Ring(GpuSlots):
    """Slots that experts pass through: those of the next wave come while those of this one are computed.

    A wave is at most half of the slots. So its kernels are launched, and its slots marked as read, before any has its
    turn comes again. Marks stay from call to call and from layer to layer, because layers of the same shapes share a
    ring.
    """

    def __init__(self, tensors: Tensors, lane: Lane) -> None:
        super().__init__(tensors)
        self._lane = lane
        self.clear()

    def clear(self) -> None:
        """Begin with the first slot; nothing that is queued may read or write any."""
        self._next = 0
        self._read: list[Mark | None] = [None] * self.num_slots

    @property
    def wave(self) -> int:
        """Experts of one wave."""
        return self.num_slots // 2

    def take(self) -> tuple[int, Mark | None]:
        """The next slot, and what has to be over before it may be written."""
        slot, self._next = self._next, (self._next + 1) % self.num_slots
        return slot, self._read[slot]

    def mark_read(self, slots: Collection[int]) -> None:
        """What was launched until now is the last that reads these slots."""
        mark = self._lane.mark()
        for slot in slots:
            self._read[slot] = mark


def make_pools(
    layers: Sequence[ExpertLayer],
    biases_L: Sequence[Tensors],
    num_slots_L: Sequence[int],
    ring_slots: int,
    lane: Lane,
) -> tuple[list[Tensors], list[Tensors]]:
    """One tensor per parameter for all layers of one shape, and the stretch of each layer and of the ring in it.

    Args:
        layers: shapes.
        biases_L: biases of each layer by name, `[E, ...]`.
        num_slots_L: slots of each layer.
        ring_slots: further slots for each shape, at least 2.
        lane: gives the memory.

    Returns:
        The stretches of the layers, and the ring that each layer uses (shared by those of the same shape).
    """
    shapes = [slot_shapes(layer, biases) for layer, biases in zip(layers, biases_L, strict=True)]
    stretches: list[Tensors] = [{}] * len(layers)
    rings: list[Tensors] = [{}] * len(layers)
    for shape in dict.fromkeys(shapes):
        members = [layer for layer, other in enumerate(shapes) if other == shape]
        total = ring_slots + sum(num_slots_L[layer] for layer in members)
        pool = {name: lane.pool((total, *size), dtype) for name, size, dtype in shape}
        ring = {name: tensor[:ring_slots] for name, tensor in pool.items()}
        start = ring_slots
        for layer in members:
            stop = start + num_slots_L[layer]
            stretches[layer] = {name: tensor[start:stop] for name, tensor in pool.items()}
            rings[layer] = ring
            start = stop
    return stretches, rings


def slot_shapes(layer: ExpertLayer, biases: Tensors) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Name, shape and dtype of everything that a slot holds."""
    weights = [(parameter.name, parameter.shape, parameter.dtype) for parameter in layer.parameters]
    return (*weights, *((name, tuple(bias_E.shape[1:]), bias_E.dtype) for name, bias_E in biases.items()))
