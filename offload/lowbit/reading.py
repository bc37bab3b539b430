"""Experts as matrices of float32, one at a time, from whatever form they are stored in.

Shapes: O outputs, C inputs of a matrix.
"""

from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any

import torch

from ..checkpoint.experts import experts_modules
from ..formats.form import Form
from ..formats.lossy.low_bit import stored_shape
from ..store.packing import room_of
from ..store.reading import Ticket
from ..store.store import ExpertStore, Slots


class ExpertReader:
    """Reads experts of a model.

    Args:
        model: the model or its skeleton.
        forms: how each layer's experts are stored.
        checksums: see `ExpertStore`.
    """

    def __init__(self, model: Any, forms: Sequence[Form], checksums: Sequence[Sequence[str]] | None = None) -> None:
        self._store = ExpertStore(model, forms, num_threads=2, checksums=checksums)
        self.model = model
        self._modules = list(experts_modules(model).values())
        self._layer, self._slots, self._room = -1, Slots(1, 1), dict[str, torch.Tensor]()

    def close(self) -> None:
        """Stop the threads and close the files."""
        self._store.close()

    def form(self, layer: int) -> Any:
        """How a layer's experts are stored."""
        return self._store.forms[layer]

    def matrices(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        """Each matrix of an expert, `[O, C]` float32, by parameter name.

        Raises:
            OSError: if it cannot be read.
        """
        form = self._store.forms[layer]
        views = self.views(layer, expert)
        if form.is_expanded:
            form.expand(views, self._room)
            views = self._room
        is_transposed = bool(self._modules[layer].is_transposed)
        for parameter in form.layer.parameters:
            stored_shape(parameter, is_transposed=is_transposed)
        return {
            parameter.name: (views[parameter.name].t() if is_transposed else views[parameter.name]).to(
                torch.float32, memory_format=torch.contiguous_format, copy=True
            )
            for parameter in form.layer.parameters
        }

    def views(self, layer: int, expert: int) -> dict[str, Any]:
        """An expert as its form gives it; valid until the next is read."""
        form = self._store.forms[layer]
        if layer != self._layer:
            self._layer, self._slots = layer, Slots(1, form.slot_bytes + form.guard_bytes)
            self._room = room_of(form.layer) if form.is_expanded else {}
        landed: SimpleQueue[Ticket] = SimpleQueue()
        _, shifts = self._store.read(layer, expert, 0, self._slots, landed)
        ticket = landed.get()
        if ticket.error is not None:
            raise OSError(f"reading expert {expert} of MoE layer {layer} failed: {ticket.error}") from ticket.error
        return form.views(self._slots.slot(0), shifts)
