"""Fine-tuning of all parameters, with weights, float32 copies and AdamW's moments of experts on the disk.

One step, with all micro-batches at a layer before any goes on:

1. Forward: each touched expert is fetched once. If it missed steps, it makes up for them first.
2. Backward: each touched expert is fetched again, computed once more from the kept routing, and leaves its gradient.
3. The norm of all gradients is known now. Each touched expert's record is read, stepped and written back, while the
   next one is read and the last one written.

Everything outside experts stays in memory, with its own float32 copies and moments.

Source: exact replay of missed steps as in `adamw.py`; all micro-batches of a layer first: GreedySnake, Yue, Yin
and Qian 2025, arXiv:2512.17570.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from ...formats.form import Form
from ...runtime.opening import OpenedCheckpoint
from ..examples import PackedRows
from ..options import TuneOptions
from ..passing.experts import Seen, Weights
from ..passing.losses import backward_passes
from ..storage.gradients import KeptGradients
from ..storage.overlay import OverlaidForm
from .adamw import AdamVector, AdamW
from .whole_model import WholeModel

GRADIENT_BYTES = 1 << 30
"""Gradients of experts that stay in memory until the step; the rest is written and read once more. Not tuned."""


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
        super().__init__(source, out, options, rows, record_bytes=record_bytes, kept_bytes=held_bytes, **memory)
        self.experts.method = self
        self._adamw = AdamW(options.rate_at, options.beta1, options.beta2, options.weight_decay)
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        self._resident = [AdamVector.begun(value.detach().float().clone()) for value in self._parameters]
        self._kept = KeptGradients(GRADIENT_BYTES, out / "experts")

    def close(self) -> None:
        super().close()
        self._kept.close()

    def step(self, number: int) -> dict[str, Any]:
        """One step of AdamW on everything."""
        options, self._step = self._options, number + 1
        loss = backward_passes(self._model, self.experts, self._rows.batches(number, options))
        norm = self._norm()
        scale = min(1.0, options.clip_norm / (norm + 1e-6)) if options.clip_norm else 1.0
        self._step_resident(scale)
        self._step_experts(scale)
        return {"loss": loss, "lm_loss": loss, "gradient_norm": norm}

    def _norm(self) -> float:
        """Of all gradients together, summed in float64 in a fixed order."""
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        square = sum(grad.double().square().sum().item() for grad in grads)
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
        """Step every touched expert: the next one is read and the last one written meanwhile."""
        keys = self._kept.keys
        with ThreadPoolExecutor(2, thread_name_prefix="expertier-record") as threads:
            reading: Future[AdamVector] | None = None
            writing: Future[None] | None = None
            for key, following in pairwise([*keys, None]):
                assert key is not None
                vector = self._vector(*key) if reading is None else reading.result()
                reading = None if following is None else threads.submit(self._vector, *following)
                self._adamw.step(vector, self._kept.take(key) * scale, self._step)
                if writing is not None:
                    writing.result()
                writing = threads.submit(self._write_vector, *key, vector, self._step)
            if writing is not None:
                writing.result()

    def enter(self, number: int) -> None:
        """All passes see the same model."""

    def seen(self, layer: int, expert: int, stored: Weights) -> Callable[[int], Seen]:
        """An expert after all earlier steps, with a gradient of its own for each pass."""
        self._catch_up(layer, expert, stored, self._step - 1)
        return lambda number: Seen({name: value.detach().requires_grad_() for name, value in stored.items()})

    def take(self, layer: int, expert: int, seen: Sequence[Seen]) -> None:
        """Keep the sum of all passes' gradients."""
        form, total = self._form(layer), torch.zeros(0)
        for each in seen:
            grads = [weight.grad for weight in form.ordered(each.weights)]
            flat = torch.cat([grad.float().reshape(-1) for grad in grads if grad is not None])
            total = flat if not len(total) else total + flat
        self._kept.keep((layer, expert), total)

    def _catch_up(self, layer: int, expert: int, stored: Weights, upto: int) -> None:
        """Let an expert make up for the steps that it missed; its first record is made of the checkpoint's weights."""
        place = self._records.place(layer, expert)
        if place is not None and place.step >= upto:
            return
        vector = self._begun(layer, stored) if place is None else self._vector(layer, expert)
        if place is not None or self._options.weight_decay:
            self._adamw.catch_up(vector, 0 if place is None else place.step, upto)
        self._write_vector(layer, expert, vector, upto)

    def _begun(self, layer: int, stored: Weights) -> AdamVector:
        return AdamVector.begun(torch.cat([weight.float().reshape(-1) for weight in self._form(layer).ordered(stored)]))

    def _vector(self, layer: int, expert: int) -> AdamVector:
        """An expert's weights and moments as of the last step that is in its record."""
        form, data = self._form(layer), self._records.read(layer, expert)
        self.experts.visits.traffic.bytes_read += data.nbytes
        numbers = data[form.layer.plain_bytes if _has_copy(form) else 0 :].view(torch.float32)
        return AdamVector(*(part.clone() for part in numbers.view(3, -1)))

    def _write_vector(self, layer: int, expert: int, vector: AdamVector, step: int) -> None:
        """Write an expert's record, and its new weights into its slot if it is in one."""
        form = self._form(layer)
        weights = _as_stored(form, vector.value)
        parts = [*form.ordered(weights), vector.value] if _has_copy(form) else [vector.value]
        self._write(layer, expert, [*parts, vector.mean, vector.square], step)
        if (held := self.experts.visits.held(layer, expert)) is not None:
            for name, weight in weights.items():
                held[name].copy_(weight)

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
        if self._records.place(layer, expert) is not None or self._options.weight_decay:
            self._catch_up(layer, expert, stored, self._options.steps)


def _as_stored(form: OverlaidForm, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Flat float32 weights as the matrices of the model."""
    return dict(_split(form, value))


def _split(form: OverlaidForm, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    start = 0
    for parameter in form.parameters:
        count = parameter.nbytes // parameter.dtype.itemsize
        yield parameter.name, value[start : start + count].to(parameter.dtype).view(parameter.shape)
        start += count


def _has_copy(form: Any) -> bool:
    """Whether the model computes with other numbers than the float32 ones that are stepped."""
    return any(parameter.dtype != torch.float32 for parameter in form.layer.parameters)


def num_elements(form: Form) -> int:
    """Parameters of one expert."""
    return sum(parameter.nbytes // parameter.dtype.itemsize for parameter in form.layer.parameters)


def record_bytes(form: Form) -> int:
    """Of one expert's record: its weights, a float32 copy of them if they are not that themselves, two moments."""
    return (form.layer.plain_bytes if _has_copy(form) else 0) + 12 * num_elements(form)


def held_bytes(opened: OpenedCheckpoint) -> int:
    """What the method holds besides the model: float32 copies, gradients and moments of everything outside experts;
    gradients of experts up to the limit; three experts on their way through the step."""
    resident = sum(parameter.numel() for parameter in opened.model.parameters())
    elements = [num_elements(form) for form in opened.forms]
    gradients = sum(4 * count * form.layer.num_experts for count, form in zip(elements, opened.forms, strict=True))
    return 16 * resident + min(GRADIENT_BYTES, gradients) + 3 * max(record_bytes(form) for form in opened.forms)
