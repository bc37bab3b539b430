"""What is read before a layer asks for it: by a plan, by a guess, or before the first token."""

from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...gpu.tier import GpuTier
from ...ram.slots import LayerSlots
from ...store.reading import Ticket, next_landed
from .changes import Changes


class ReadingAhead:
    """Reads into the slots of a running model.

    Args:
        layers: RAM slots of each.
        changes: guards them.
    """

    def __init__(self, layers: Sequence[LayerSlots], changes: Changes) -> None:
        self._layers, self._changes = layers, changes
        self.gpu: GpuTier | None = None

    def fill(self, experts_L: Sequence[Sequence[int]]) -> None:
        """Read experts into free slots before anything asks for them; gives up none that is there.

        Raises:
            OSError: if reading fails.
        """
        landed: SimpleQueue[Ticket] = SimpleQueue()
        reads = 0
        for slots, experts in zip(self._layers, experts_L, strict=True):
            for expert in [expert for expert in experts if expert not in slots][: slots.num_free]:
                slots.start_read(expert, (), landed)
                reads += 1
        for _ in range(reads):
            next_landed(landed, "an expert that the plan starts with")

    def read(self, plan: Mapping[int, Sequence[int]]) -> None:
        """Start reading what later layers of this pass will certainly need, nearest layer first, where there is room.

        Args:
            plan: layer -> its experts in this pass, most used first.
        """
        with self._changes.within():
            for layer, experts in sorted(plan.items()):
                slots = self._layers[layer]
                experts = [expert for expert in experts if 0 <= expert < slots.num_experts]
                present = [expert for expert in experts if expert in slots]
                if self.gpu is not None:
                    experts = self.gpu.prepare(layer, experts)
                    present += self.gpu.lent(layer)
                waiting = [expert for expert in experts if expert not in slots]
                for expert in waiting:
                    slots.read_ahead(expert, present, len(waiting))

    def expect_use(self, use_LE: NDArray[np.floating[Any]], most: int) -> None:
        """A pass begins: start to read what it will probably use, the first layers first.

        Args:
            use_LE: how likely each expert is, 0..1; E is that of the widest layer.
            most: experts of one layer that may be on their way at the same time.
        """
        with self._changes.within():
            for slots, use_E in zip(self._layers, use_LE, strict=True):
                slots.expect_use(use_E[: slots.num_experts], most)

    def hold(self, experts: Mapping[int, Sequence[int]]) -> None:
        """Keep what a router says that its next tokens can visit, and start reading what is missing of it.

        Args:
            experts: layer -> experts; a layer keeps them until it is named again.
        """
        if self.gpu is not None:  # GPU slots are filled through RAM slots, whose bookkeeping is the tier's
            return
        with self._changes.within():
            for layer, held in experts.items():
                self._layers[layer].hold(held)
