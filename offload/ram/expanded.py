"""Stored experts as the matrices of the model, for everything that no kernel computes from the stored bytes."""

from collections.abc import Sequence

import torch

from ..checkpoint.experts import ExpertLayer
from ..formats.form import Form
from ..memory.huge_pages import huge_mapping
from .slots import LayerSlots

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class ExpandedWeights:
    """The experts of one layer by id, expanded one at a time, always into the same room.

    Args:
        slots: the layer's stored experts.
        form: what their bytes mean.
        room: a matrix for each parameter, which every expert is written to in turn.
    """

    holds_several = False

    def __init__(self, slots: LayerSlots, form: Form, room: dict[str, torch.Tensor]) -> None:
        self._slots, self._form, self._room = slots, form, room

    def __getitem__(self, expert: int) -> dict[str, torch.Tensor]:
        """An expert's weights; they stay until another is asked for."""
        self._form.expand(self._slots[expert], self._room)
        return self._room


def make_rooms(forms: Sequence[Form]) -> list[dict[str, torch.Tensor] | None]:
    """Room for one expanded expert for each layer, shared by layers of the same shapes; None where none is needed."""
    rooms = {shapes: _room(layer) for shapes, layer in _kinds(forms).items()}
    return [rooms[_shapes(form.layer)] if form.is_expanded else None for form in forms]


def room_bytes(forms: Sequence[Form]) -> int:
    """What `make_rooms` takes."""
    return sum(layer.plain_bytes for layer in _kinds(forms).values())


def _kinds(forms: Sequence[Form]) -> dict[Shapes, ExpertLayer]:
    """One layer of each kind whose experts have to be expanded."""
    return {_shapes(form.layer): form.layer for form in forms if form.is_expanded}


def _shapes(layer: ExpertLayer) -> Shapes:
    return tuple((parameter.name, parameter.shape) for parameter in layer.parameters)


def _room(layer: ExpertLayer) -> dict[str, torch.Tensor]:
    memory = torch.frombuffer(huge_mapping(layer.plain_bytes), dtype=torch.uint8)
    room, start = {}, 0
    for parameter in layer.parameters:
        room[parameter.name] = memory[start : start + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        start += parameter.nbytes
    return room
