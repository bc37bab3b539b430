"""Fine-tuning of all parameters, with weights, float32 copies and AdamW's moments of experts on the disk.

One step, with all micro-batches at a layer before any goes on:

1. Forward: each touched expert is fetched once. If it missed steps, it makes up for them first.
2. Backward: each touched expert is fetched again, computed once more from the kept routing, and leaves its gradient.
3. The norm of all gradients is known now. Each touched expert's record is read, stepped and written back, while the
   next one is read and the last one written.

Everything outside experts stays in memory, with its own float32 copies and moments. Moments of experts may be stored
in bytes (`state_bits` 8), which is not exact: they are rounded whenever a record is written.

Source: exact replay of missed steps as in `adamw.py`; all micro-batches of a layer first: GreedySnake, Yue, Yin
and Qian 2025, arXiv:2512.17570.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from ...runtime.opening import OpenedCheckpoint
from ..examples import PackedRows
from ..options import TuneOptions
from ..passing.losses import backward_passes, relative_error
from ..passing.opening import spilled_activations
from ..passing.rows import Seen, Weights
from ..storage.gradients import KeptGradients
from .adamw import AdamVector, AdamW
from .record_layout import RecordLayout
from .whole_model import WholeModel

GRADIENT_BYTES = 1 << 30
"""Gradients of experts that stay in memory until the step; the rest is written and read once more. Not tuned."""

READS_AHEAD = 2
"""Records of the next experts that are on their way: the disk has something to do while one read ends."""
NUM_ROOMS = READS_AHEAD + 3
"""Rooms for records: besides those that are read, one is stepped, and two are written or wait for it."""


class AllParameters(WholeModel):
    """The method `full`.

    Args:
        source: the model's folder or id.
        out: the run's folder.
        options: the run's settings.
        rows: what to learn.
        memory: `cache_experts` or `cpu_memory`, as `open_tuned` takes them.
    """

    def __init__(self, source: str | Path, out: Path, options: TuneOptions, rows: PackedRows, **memory: Any) -> None:
        super().__init__(source, out, options, rows, num_rooms=NUM_ROOMS, **sizes_of(options), **memory)
        self._layouts = [RecordLayout(form, options.state_bits) for form in self._tuned.forms]
        self.experts.method = self
        self._adamw = AdamW(options.rate_at, options.beta1, options.beta2, options.weight_decay)
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self._resident = [AdamVector.begun(value.detach().float().clone()) for value in self._parameters]
        self._spilled = spilled_activations(self._tuned, out, options)
        self._is_first = True
        most = max(layout.num_elements for layout in self._layouts)
        num_experts = sum(layout.form.layer.num_experts for layout in self._layouts)
        self._kept = KeptGradients(GRADIENT_BYTES, out / "experts", most, num_experts)

    def close(self) -> None:
        super().close()
        self._kept.close()
        if self._spilled is not None:
            self._spilled.close()

    def step(self, number: int) -> dict[str, Any]:
        """One step of AdamW on everything."""
        options, self._step = self._options, number + 1
        exact = self._exact_gradients(number) if self._is_first and self._is_coded else None
        self._is_first = False
        loss = self._gradients(number)
        told = {} if self._spilled is None else self._spilled.as_metrics()
        if exact is not None:
            told["gradient_error"] = relative_error(self._resident_gradients, exact)
        norm = self._norm()
        scale = min(1.0, options.clip_norm / (norm + 1e-6)) if options.clip_norm else 1.0
        self._step_resident(scale)
        self._step_experts(scale)
        return {"loss": loss, "lm_loss": loss, "gradient_norm": norm, **told}

    def _gradients(self, number: int) -> float:
        """Leave a step's gradients at the parameters and in `_kept`; its loss."""
        return backward_passes(self._model, self.experts, self._rows.batches(number, self._options), self._spilled)

    @property
    def _is_coded(self) -> bool:
        return self._spilled is not None and self._spilled.is_coded

    @property
    def _resident_gradients(self) -> list[torch.Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _exact_gradients(self, number: int) -> list[torch.Tensor]:
        """A step's gradients outside experts with activations as they are, to compare those with."""
        assert self._spilled is not None
        with self._spilled.exact():
            self._gradients(number)
        found = self._resident_gradients
        for parameter in self._parameters:
            parameter.grad = None
        self._kept.clear()
        return found

    def _norm(self) -> float:
        """Of all gradients together, summed in float64 in a fixed order."""
        square = sum(grad.double().square().sum().item() for grad in self._resident_gradients)
        return float((square + self._kept.square()) ** 0.5)

    @torch.no_grad()
    def _step_resident(self, scale: float) -> None:
        for parameter, vector in zip(self._parameters, self._resident, strict=True):
            # a part that text does not pass through (a vision tower) is left alone, as torch's own AdamW does
            if parameter.grad is None:
                continue
            self._adamw.step(vector, parameter.grad.float() * scale, self._step, decays=parameter.dim() >= 2)
            parameter.copy_(vector.value)
            parameter.grad = None

    def _step_experts(self, scale: float) -> None:
        """Step every touched expert: the next ones are read and the last ones are written meanwhile."""
        keys = self._kept.keys
        with ThreadPoolExecutor(READS_AHEAD, thread_name_prefix="expertier-record") as readers:
            reading = deque(
                readers.submit(self._records.read, *key, self._records.room()) for key in keys[:READS_AHEAD]
            )
            for key, following in zip_longest(keys, keys[READS_AHEAD:]):
                room = reading.popleft().result()
                if following is not None:
                    reading.append(readers.submit(self._records.read, *following, self._records.room()))
                layout = self._layouts[key[0]]
                self.experts.visits.traffic.bytes_read += layout.nbytes
                vector = layout.vector(room)
                self._adamw.step(vector, self._kept.take(key).mul_(scale), self._step)
                self._write_vector(*key, vector, room, self._step)
        self._records.wait()
        self._kept.clear()

    def enter(self, number: int) -> None:
        """All passes see the same model."""

    def seen(self, layer: int, expert: int, stored: Weights) -> Callable[[int], Seen]:
        """An expert after all earlier steps, with a gradient of its own for each pass."""
        caught_up = self._caught_up(layer, expert, stored, self._step - 1)
        if caught_up is not None:
            self._write_vector(layer, expert, *caught_up, self._step - 1)
        return lambda number: Seen({name: value.detach().requires_grad_() for name, value in stored.items()})

    def take(self, layer: int, expert: int, seen: Sequence[Seen]) -> None:
        """Keep the sum of all passes' gradients."""
        matrices = zip(*(self._form(layer).ordered(each.weights) for each in seen), strict=True)
        self._kept.keep((layer, expert), [[weight.grad for weight in weights] for weights in matrices])

    def _caught_up(self, layer: int, expert: int, stored: Weights, upto: int) -> tuple[AdamVector, torch.Tensor] | None:
        """An expert after the steps that it missed, begun with the checkpoint's weights, and the room of its record.

        None if its record is that already.
        """
        place, layout = self._records.place(layer, expert), self._layouts[layer]
        if place is not None and place.step >= upto:
            return None
        room = self._records.room()
        if place is None:
            vector = layout.begin(self._form(layer).ordered(stored), room)
        else:
            vector = layout.vector(self._records.read(layer, expert, room))
            self.experts.visits.traffic.bytes_read += layout.nbytes
        if place is not None or self._options.weight_decay:
            self._adamw.catch_up(vector, 0 if place is None else place.step, upto)
        return vector, room

    def _write_vector(self, layer: int, expert: int, vector: AdamVector, room: torch.Tensor, step: int) -> None:
        """Write an expert's record behind, and its new weights into its slot if it is in one."""
        layout = self._layouts[layer]
        layout.store(vector, room)
        self._write_behind(layer, expert, room, step)
        if (held := self.experts.visits.held(layer, expert)) is not None:
            for matrix, part in zip(self._form(layer).ordered(held), layout.split(vector.value), strict=True):
                matrix.copy_(part)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Float32 copies and moments of everything outside experts, and the table of records."""
        tensors = {
            f"{name}.{number}": value
            for number, vector in enumerate(self._resident)
            for name, value in vars(vector).items()
        }
        return tensors, {"records": self._records.secure()}

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from a commit.

        Raises:
            KeyError, RuntimeError: if it is of another model.
        """
        self._restore([tensors[f"value.{number}"] for number in range(len(self._parameters))], facts["records"])
        for number, vector in enumerate(self._resident):
            for name, value in vars(vector).items():
                value.copy_(tensors[f"{name}.{number}"])
        self._step = int(facts["step"])

    def _finish(self, layer: int, expert: int, stored: Weights) -> None:
        if self._records.place(layer, expert) is None and not self._options.weight_decay:
            return
        caught_up = self._caught_up(layer, expert, stored, self._options.steps)
        if caught_up is None:
            return
        vector, room = caught_up
        for matrix, part in zip(
            self._form(layer).ordered(stored), self._layouts[layer].split(vector.value), strict=True
        ):
            matrix.copy_(part)
        self._records.give_back(room)


def sizes_of(options: TuneOptions) -> dict[str, Any]:
    """How many bytes the method needs on the disk for an expert, and in memory besides the model."""
    return {
        "record_bytes": lambda form: RecordLayout(form, options.state_bits).nbytes,
        "kept_bytes": lambda opened: held_bytes(opened, options),
    }


def held_bytes(opened: OpenedCheckpoint, options: TuneOptions) -> int:
    """What the method holds besides the model: float32 copies, gradients and moments of everything outside experts;
    gradients of experts up to the limit; some experts with their moments on their way through the step."""
    resident = sum(parameter.numel() for parameter in opened.model.parameters())
    layouts = [RecordLayout(form, options.state_bits) for form in opened.forms]
    gradients = sum(4 * layout.num_elements * layout.form.layer.num_experts for layout in layouts)
    passing = max(layout.nbytes + 12 * layout.num_elements for layout in layouts)
    # once, gradients with exact activations beside those with coded ones
    of_one = 16 if options.activation_bits is None else 20
    return of_one * resident + min(GRADIENT_BYTES, gradients) + NUM_ROOMS * passing
