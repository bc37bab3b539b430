"""Another GPU's memory below the GPU that computes: what that one gives up goes there, and comes back from there.

A copy between two GPUs is quicker than one from host memory, and nothing has to be read. All copies are in order on one
stream: a slot is copied away before it is overwritten, and a peer's slot is read before it is.

Source: Du et al. 2022 (EnergonAI), arXiv:2209.02341, section 4.3 (peer memory pooling), there for whole layers.

Shapes: E experts, C slots.
"""

from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..checkpoint.experts import ExpertLayer
from .lanes import Lane, Pairs
from .slots import GpuSlots, Tensors


class PeerSlots(GpuSlots):
    """The slots of one layer on the other GPU.

    Args:
        tensors: parameter -> `[C, ...]`, C at least 1.
        rank: how much an expert is worth keeping.
        on_gpu: experts in GPU slots; theirs are given up first.
    """

    def __init__(self, tensors: Tensors, rank: Callable[[int], Any], on_gpu: Container[int]) -> None:
        super().__init__(tensors)
        self._rank, self._on_gpu = rank, on_gpu
        self.held: frozenset[int] = frozenset()
        """Experts that a plan keeps here: they are not given up."""
        self.clear()

    def clear(self) -> None:
        """Forget what the slots hold; nothing that is queued may read or write them."""
        self._slot_of: dict[int, int] = {}
        self._free = list(range(self.num_slots))[::-1]
        self._needed: Collection[int] = ()

    def __contains__(self, expert: int) -> bool:
        return expert in self._slot_of

    def weights(self, expert: int) -> dict[str, torch.Tensor]:
        """An expert's matrices, for a copy that is queued now."""
        return {name: tensor[self._slot_of[expert]] for name, tensor in self.tensors.items()}

    def keep(self, expert: int, weights: Mapping[str, torch.Tensor]) -> Pairs:
        """Give a slot to an expert that the GPU gives up; gives what is to be copied, nothing if it is here or no room.

        Args:
            expert: its id.
            weights: where it lies on the GPU.
        """
        if expert in self or not self._make_room():
            return ()
        self._slot_of[expert] = slot = self._free.pop()
        return self.pairs(slot, {name: weights[name] for name in self.tensors})

    def place(self, expert: int, weights: Mapping[str, torch.Tensor]) -> Pairs:
        """Give a free slot to an expert that a plan puts here; gives what is to be copied.

        Args:
            expert: its id.
            weights: where it lies in host memory.
        """
        self._slot_of[expert] = slot = self._free.pop()
        return self.pairs(slot, {name: weights[name] for name in self.tensors})

    @contextmanager
    def holding(self, experts: Collection[int]) -> Iterator[None]:
        """Within, these experts are not given up: copies of them are still to be queued."""
        self._needed = experts
        yield
        self._needed = ()

    def _make_room(self) -> bool:
        if self._free:
            return True
        others = [expert for expert in self._slot_of if expert not in self._needed and expert not in self.held]
        if not others:
            return False
        twice = [expert for expert in others if expert in self._on_gpu]
        self._free.append(self._slot_of.pop(min(twice or others, key=self._rank)))
        return True


def make_peers(
    lane: Lane,
    layers: Sequence[ExpertLayer],
    num_slots_L: Sequence[int],
    ranks_L: Sequence[Callable[[int], Any]],
    on_gpu_L: Sequence[Container[int]],
) -> list[PeerSlots | None]:
    """Slots of each layer on another GPU; None for a layer that gets none.

    Raises:
        ValueError: if there is no other GPU.
    """
    peers: list[PeerSlots | None] = []
    for layer, count, rank, on_gpu in zip(layers, num_slots_L, ranks_L, on_gpu_L, strict=True):
        if not count:
            peers.append(None)
            continue
        tensors = {
            parameter.name: lane.peer_pool((count, *parameter.shape), parameter.dtype) for parameter in layer.parameters
        }
        peers.append(PeerSlots(tensors, rank, on_gpu))
    return peers
