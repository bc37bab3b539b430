"""Fine-tuning without a backward pass: the loss at two perturbed points says how far to go along a random direction.

One step draws a direction z, measures the losses L+ and L- at W + epsilon z and W - epsilon z on the same rows, and
sets W to W - rate * (L+ - L-) / (2 epsilon) * z. Directions are drawn from seeds and never stored.

Both passes go through the model side by side. Each expert is read once: in its slot it first gets the update of the
last step that touched it, whose size is known by now. Then it is perturbed twice, and computed for both passes.

A step touches the experts that either of its passes routes a token to. Others are neither perturbed nor changed: their
weights are not in the two losses, so MeZO's change of them would be noise only.

Source: Malladi et al. 2023 (MeZO), arXiv:2305.17333, algorithm 1; Wang et al. 2025 (ZO2), arXiv:2503.12668
(the update of the last step at the next visit).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...compute.resident import weight_bytes
from ...runtime.opening import OpenedCheckpoint
from ..examples import PackedRows
from ..options import TuneOptions
from ..passing.experts import Seen, Weights
from ..passing.losses import learnt_tokens, share_of_loss
from ..storage.records import Key
from .whole_model import WholeModel

RESIDENT = 0
"""In place of a layer's number, which counts from 1 here, in the seeds of everything outside experts."""


class Direction:
    """One random direction of one step for some tensors, drawn once, one tensor after the other.

    Args:
        seed: the run's, 0 or more.
        step: counts from 1.
        owner: a MoE layer, from 1, and an expert; or RESIDENT and the number of a parameter.
    """

    def __init__(self, seed: int, step: int, owner: tuple[int, int]) -> None:
        (word,) = np.random.SeedSequence([seed, step, *owner]).generate_state(1, np.uint64)
        self._generator = torch.Generator().manual_seed(int(word) >> 1)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Standard normal numbers in float32, of the shape of a tensor."""
        return torch.randn(tensor.shape, generator=self._generator)

    def round(self, value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Round float32 numbers to what weights are stored in, in bfloat16 up or down by chance.

        Changes of a step are far smaller than a bfloat16's last bit, and would be lost if they were rounded to the
        nearest. By chance they arrive on average. The chance is drawn after the directions, from the same seed.
        """
        if dtype != torch.bfloat16:
            return value.to(dtype)
        chance = torch.randint(0, 1 << 16, value.shape, generator=self._generator, dtype=torch.int32)
        return ((value.view(torch.int32) + chance) & -(1 << 16)).view(torch.float32).to(dtype)


def perturbed(weight: torch.Tensor, direction: torch.Tensor, epsilon: float) -> torch.Tensor:
    """A weight at a distance along a direction, in its own dtype."""
    return torch.add(weight.float(), direction, alpha=epsilon).to(weight.dtype)


def moved(weights: Sequence[torch.Tensor], by: Direction, size: float) -> list[torch.Tensor]:
    """Weights after a step of some size against its direction; all of an owner together, in their order."""
    found = [torch.add(weight.float(), by.of(weight), alpha=-size) for weight in weights]
    return [by.round(value, weight.dtype) for value, weight in zip(found, weights, strict=True)]


class ForwardOnly(WholeModel):
    """The method `zo`.

    Args:
        source: the model's folder or id.
        out: the run's folder.
        options: the run's settings.
        rows: what to learn.
        memory: `cache_experts` or `cpu_memory`, as `open_tuned` takes them.
    """

    def __init__(self, source: str | Path, out: Path, options: TuneOptions, rows: PackedRows, **memory: Any) -> None:
        super().__init__(
            source,
            out,
            options,
            rows,
            record_bytes=lambda form: form.layer.plain_bytes,
            kept_bytes=versions_bytes,
            **memory,
        )
        self.experts.method = self
        self.experts.lockstep.enter = self.enter
        self._base = [parameter.data for parameter in self._parameters]
        self._versions: list[list[torch.Tensor]] = []
        self._entered = -1
        self._pending: dict[Key, int] = {}
        self._sizes: dict[int, float] = {}
        """How far the steps went that some expert has yet to go: rate * (L+ - L-) / (2 epsilon)."""

    def step(self, number: int) -> dict[str, Any]:
        """One step; `loss` is the mean of both passes, `gradient_norm` that along the direction."""
        options, self._step = self._options, number + 1
        batches = self._rows.batches(number, options)
        num_learnt = learnt_tokens([labels for _, labels in batches])
        self._perturb_resident()
        losses = self.experts.lockstep.run(
            [partial(self._loss, ids, labels, num_learnt) for _ in range(2) for ids, labels in batches],
            self.experts.answer,
        )
        plus, minus = sum(losses[: len(batches)]), sum(losses[len(batches) :])
        slope = (plus - minus) / (2 * options.epsilon)
        self._sizes[self._step] = options.rate_at(self._step) * slope
        self._move_resident()
        self._sizes = {step: size for step, size in self._sizes.items() if step in set(self._pending.values())}
        loss = (plus + minus) / 2
        return {"loss": loss, "lm_loss": loss, "gradient_norm": abs(slope)}

    @torch.no_grad()
    def _loss(self, token_BS: torch.Tensor, label_BS: torch.Tensor, num_learnt: int) -> float:
        with torch.no_grad():
            return float(share_of_loss(self._model, token_BS, label_BS, num_learnt))

    def enter(self, number: int) -> None:
        """Let the model outside experts be what pass `number` sees."""
        sign = 0 if number < self._options.accumulation else 1
        if sign != self._entered:
            for parameter, data in zip(self._parameters, self._versions[sign], strict=True):
                parameter.data = data
            self._entered = sign

    def _perturb_resident(self) -> None:
        self._versions = [[], []]
        for number, weight in enumerate(self._base):
            direction = Direction(self._options.seed, self._step, (RESIDENT, number)).of(weight)
            for version, epsilon in zip(self._versions, self._epsilons, strict=True):
                version.append(perturbed(weight, direction, epsilon))

    def _move_resident(self) -> None:
        self._versions, self._entered = [], -1
        size = self._sizes[self._step]
        for number, parameter in enumerate(self._parameters):
            by = Direction(self._options.seed, self._step, (RESIDENT, number))
            self._base[number] = parameter.data = moved([self._base[number]], by, size)[0]

    @property
    def _epsilons(self) -> tuple[float, float]:
        return self._options.epsilon, -self._options.epsilon

    def seen(self, layer: int, expert: int, stored: Weights) -> Callable[[int], Seen]:
        """An expert in its slot: brought up to date there, then perturbed in both ways."""
        self._finish(layer, expert, stored)
        self._pending[layer, expert] = self._step
        direction = Direction(self._options.seed, self._step, (layer + 1, expert))
        form = self._form(layer)
        drawn = [direction.of(weight) for weight in form.ordered(stored)]
        made: dict[int, Seen] = {}

        def of_pass(number: int) -> Seen:
            sign = 0 if number < self._options.accumulation else 1
            if sign not in made:
                pairs = zip(form.parameters, drawn, strict=True)
                names = {parameter.name: z for parameter, z in pairs}
                epsilon = self._epsilons[sign]
                made[sign] = Seen({name: perturbed(stored[name], z, epsilon) for name, z in names.items()})
            return made[sign]

        return of_pass

    def _finish(self, layer: int, expert: int, stored: Weights) -> None:
        """Give an expert in its slot the update that it has yet to get, and write its record."""
        step = self._pending.pop((layer, expert), None)
        if step is None:
            return
        weights = self._form(layer).ordered(stored)
        by = Direction(self._options.seed, step, (layer + 1, expert))
        for weight, new in zip(weights, moved(weights, by, self._sizes[step]), strict=True):
            weight.copy_(new)
        self._write(layer, expert, weights, step)

    def take(self, layer: int, expert: int, seen: Sequence[Seen]) -> None:
        raise AssertionError("a method without a backward pass takes no gradients")

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Weights outside experts, the table of records, and what experts have yet to get."""
        return {f"{number}": weight for number, weight in enumerate(self._base)}, {
            "records": self._records.secure(),
            "pending": {f"{layer}.{expert}": step for (layer, expert), step in self._pending.items()},
            "sizes": {str(step): size for step, size in self._sizes.items()},
        }

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from a commit.

        Raises:
            KeyError, ValueError: if it is of another model.
        """
        self._restore([tensors[str(number)] for number in range(len(self._parameters))], facts)
        self._sizes = {int(step): float(size) for step, size in facts["sizes"].items()}
        self._pending = {
            (int(layer), int(expert)): int(step)
            for key, step in facts["pending"].items()
            for layer, expert in [key.split(".")]
        }


def versions_bytes(opened: OpenedCheckpoint) -> int:
    """What the method holds besides the model: both perturbed versions of everything outside experts."""
    return 2 * weight_bytes(opened.model)
