"""Compressed experts as plain matrices, for everything that our kernel of compressed single tokens does not compute."""

from collections.abc import Sequence

import torch

from ..checkpoint.experts import ExpertLayer
from ..formats.compression import expand
from ..memory.huge_pages import huge_mapping
from .slots import LayerSlots

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class ExpandedWeights:
    """The experts of one layer by id, expanded one at a time, always into the same room.

    Args:
        slots: the layer's compressed experts.
        room: plain matrices by name.
    """

    holds_several = False

    def __init__(self, slots: LayerSlots, room: dict[str, torch.Tensor]) -> None:
        self._slots, self._room = slots, room

    def __getitem__(self, expert: int) -> dict[str, torch.Tensor]:
        """An expert's weights; they stay until another is asked for."""
        for name, compressed in self._slots[expert].items():
            expand(compressed, self._room[name])
        return self._room


def make_rooms(layers: Sequence[ExpertLayer]) -> list[dict[str, torch.Tensor] | None]:
    """Room for one plain expert for each layer, shared by layers of the same shapes; None for layers stored plainly."""
    rooms = {shapes: _room(layer) for shapes, layer in _kinds(layers).items()}
    return [None if layer.compressed_E is None else rooms[_shapes(layer)] for layer in layers]


def room_bytes(layers: Sequence[ExpertLayer]) -> int:
    """What `make_rooms` takes."""
    return sum(layer.plain_bytes for layer in _kinds(layers).values())


def _kinds(layers: Sequence[ExpertLayer]) -> dict[Shapes, ExpertLayer]:
    """One compressed layer of each kind."""
    return {_shapes(layer): layer for layer in layers if layer.compressed_E is not None}


def _shapes(layer: ExpertLayer) -> Shapes:
    return tuple((parameter.name, parameter.shape) for parameter in layer.parameters)


def _room(layer: ExpertLayer) -> dict[str, torch.Tensor]:
    memory = torch.frombuffer(huge_mapping(layer.plain_bytes), dtype=torch.uint8)
    room, start = {}, 0
    for parameter in layer.parameters:
        room[parameter.name] = memory[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        start += parameter.nbytes
    return room
