"""Experts on their way to the GPU before their layer is asked, where routers have decided ahead.

A plan is exact, so GPU slots may be given up for it. Copies are queued behind those of the layer that runs: of what is
in RAM at once, of what the disk still reads when a later layer runs and it has landed. What has not been queued when
its layer's turn comes takes the ordinary way.

Source: Hwang et al. 2023 (Pre-gated MoE), arXiv:2308.12066, section 4.2.
"""

from collections.abc import Sequence
from functools import partial

from .counters import GpuCounters
from .lanes import Copy
from .layer import GpuLayer
from .slots import Tensors


class CopiesAhead:
    """What is still to be copied for each layer.

    Args:
        layers: all layers of a tier.
        counters: receive copies.
    """

    def __init__(self, layers: Sequence[GpuLayer], counters: GpuCounters) -> None:
        self._layers, self._counters = layers, counters
        self.clear()

    def clear(self) -> None:
        """Forget all plans."""
        self._planned: dict[int, frozenset[int]] = {}
        self._waiting: dict[int, list[int]] = {}

    def plan(self, layer: int, experts: Sequence[int]) -> None:
        """A router has decided what a later layer of this pass will use.

        Args:
            layer: whose experts these are.
            experts: most used first. More than there are slots for are a prompt's, which takes free slots only, so that
                decoding finds its experts again.
        """
        slots = self._layers[layer].slots
        missing = [expert for expert in experts if expert not in slots]
        room = slots.room_beside(experts) if len(experts) <= slots.num_slots else slots.num_free
        self._planned[layer], self._waiting[layer] = frozenset(experts), missing[:room]

    def begin(self, layer: int) -> None:
        """The layer's turn has come: what was not queued is its own business."""
        self._planned.pop(layer, None)
        self._waiting.pop(layer, None)

    def advance(self) -> None:
        """Queue copies of what is in RAM by now, nearest layer first."""
        for layer, waiting in sorted(self._waiting.items()):
            here = self._layers[layer]
            for expert in list(waiting):
                peer = here.peer if here.peer is not None and expert in here.peer else None
                if peer is not None:
                    with peer.holding((expert,)):
                        copy = partial(self._copy, here, peer.weights(expert))
                        here.slots.take_ahead(expert, self._planned[layer], copy)
                elif (weights := here.ram.take_early(expert)) is not None:
                    here.slots.take_ahead(expert, self._planned[layer], partial(self._lend, here, expert, weights))
                else:
                    continue
                waiting.remove(expert)

    def _lend(self, layer: GpuLayer, expert: int, weights: Tensors, slot: int) -> Copy:
        layer.lent[expert] = copy = self._copy(layer, weights, slot)
        return copy

    def _copy(self, layer: GpuLayer, weights: Tensors, slot: int) -> Copy:
        copy = layer.lane.copy_in(layer.slots.pairs(slot, weights), layer.slots.released)
        self._counters.copies.append(copy)
        self._counters.ahead += 1
        return copy
