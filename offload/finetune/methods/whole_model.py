"""What methods share that change every weight: experts in records on the disk, everything else in memory."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ...formats.form import Form
from ...runtime.opening import OpenedCheckpoint
from ..examples import PackedRows
from ..options import TuneOptions
from ..passing.opening import TunedModel, open_tuned
from ..passing.rows import Weights
from ..storage.export import LayerWeights, write_model
from ..storage.overlay import OverlaidForm, expect_plain
from ..storage.records import ExpertRecords


class WholeModel(ABC):
    """A model that changes as a whole.

    Args:
        source: the model's folder or id.
        out: the run's folder.
        options: the run's settings.
        rows: what to learn.
        record_bytes: of one expert's record, from its form.
        kept_bytes: what the method holds besides the model, rooms for records included.
        num_rooms: records that are on their way to the disk or from it at a time.
        number: of this process among those that do the run; each has records of its own.
        memory: `cache_experts` or `cpu_memory`, as `open_tuned` takes them.
    """

    # sums are in the order of a resident model's, and of several processes that share passes
    joins_passes = False

    def __init__(
        self,
        source: str | Path,
        out: Path,
        options: TuneOptions,
        rows: PackedRows,
        *,
        record_bytes: Callable[[Form], int],
        kept_bytes: Callable[[OpenedCheckpoint], int],
        num_rooms: int,
        number: int = 0,
        **memory: Any,
    ) -> None:
        self._source, self._options, self._rows = source, options, rows

        def overlay(forms: Sequence[Form]) -> list[Form]:
            plain = expect_plain(forms, options.method)
            folder = out / (f"experts-{number}" if number else "experts")
            self._records = ExpertRecords(folder, [record_bytes(form) for form in plain])
            return [OverlaidForm(form.layer, layer, self._records) for layer, form in enumerate(plain)]

        self._tuned: TunedModel = open_tuned(source, options, **memory, overlay=overlay, kept_bytes=kept_bytes)
        self._model, self.experts = self._tuned.model, self._tuned.experts
        self._parameters = [value for value in self._model.parameters() if value.is_floating_point()]
        self._step = 0
        self._records.make_rooms(num_rooms, is_direct=self.experts.visits.is_direct)

    def close(self) -> None:
        """End threads, close files."""
        self._tuned.close()
        self._records.close()

    def _form(self, layer: int) -> OverlaidForm:
        form = self._tuned.forms[layer]
        assert isinstance(form, OverlaidForm)
        return form

    def _write_behind(self, layer: int, expert: int, room: torch.Tensor, step: int) -> None:
        """Let the record in a room be written, and count its bytes."""
        self._records.write_behind(layer, expert, room, step)
        self.experts.visits.traffic.bytes_written += self._records.record_bytes(layer)

    def committed(self) -> None:
        self._records.commit()

    def _restore(self, weights: Sequence[torch.Tensor], table: dict[str, list[Any]]) -> None:
        """Put a commit's weights outside experts and its table of records in place.

        Raises:
            KeyError, ValueError: if it is of another model.
        """
        for place, (parameter, weight) in enumerate(zip(self._parameters, weights, strict=True)):
            if weight.shape != parameter.shape:
                raise ValueError(f"tensor {place} of the commit has another shape than the model's")
            parameter.data.copy_(weight)
        self._records.restore(table)

    @abstractmethod
    def _finish(self, layer: int, expert: int, stored: Weights) -> None:
        """Let an expert in its slot be what it is after the last step."""

    def publish(self, out: Path) -> None:
        """Write the model as it is after the last step."""
        layers = ((form.layer, self._finished(number)) for number, form in enumerate(self._tuned.forms))
        write_model(out, self._source, self._model, layers)

    def _finished(self, layer: int) -> LayerWeights:
        for expert, stored in self.experts.visits(layer, range(self._form(layer).layer.num_experts)):
            self._finish(layer, expert, stored)
            yield expert, stored
