"""Fine-tuning without a backward pass: the loss at two perturbed points says how far to go along a random direction.

One step draws a direction z, measures the losses L+ and L- at W + epsilon z and W - epsilon z on the same rows, and
sets W to W - rate * (L+ - L-) / (2 epsilon) * z. Directions are drawn from seeds and never stored.

Both passes go through the model side by side. Each expert is read once: in its slot it first gets the update of the
last step that touched it, whose size is known by now. Then it is perturbed twice, and computed for both passes.

A step touches the experts that either of its passes routes a token to. Others are neither perturbed nor changed: their
weights are not in the two losses, so MeZO's change of them would be noise only.

Several processes share a step: each does some of its passes, and all learn every loss and every touched expert. Then
each moves its own copy of the model by the same numbers. An expert that only others touched is moved when it is
visited here next, by all steps that it has missed, or in the end.

Source: Malladi et al. 2023 (MeZO), arXiv:2305.17333, algorithm 1; Spall 1992, IEEE Transactions on Automatic Control
37(3), section III, for directions of signs; Wang et al. 2025 (ZO2), arXiv:2503.12668
(the update of the last step at the next visit); Wang et al. 2025 (DistZO2), arXiv:2507.03211 (processes that share
perturbations).
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...compute.resident import weight_bytes
from ...runtime.opening import OpenedCheckpoint
from ..examples import PackedRows
from ..options import TuneOptions
from ..passing.losses import learnt_tokens, share_of_loss
from ..passing.rows import Seen, Weights
from ..peers import Alone, Peers
from ..storage.records import Key
from .directions import Direction, visit
from .whole_model import WholeModel

ALONE = Alone()
Pass = tuple[int, int]
"""Which side of the weights, 0 or 1, and which micro-batch."""
RESIDENT = 0
"""In place of a layer's number, which counts from 1 here, in the seeds of everything outside experts."""
DRAWS = "eight generators of a block"
"""How directions are drawn: a commit that was drawn otherwise would be brought up to date along others."""
NUM_ROOMS = 4
"""Records that are written behind at a time. Not tuned."""


class ForwardOnly(WholeModel):
    """The method `zo`.

    Args:
        source: the model's folder or id.
        out: the run's folder.
        options: the run's settings.
        rows: what to learn.
        peers: the processes that do the run together.
        memory: `cache_experts` or `cpu_memory`, as `open_tuned` takes them.
    """

    def __init__(
        self,
        source: str | Path,
        out: Path,
        options: TuneOptions,
        rows: PackedRows,
        *,
        peers: Peers = ALONE,
        **memory: Any,
    ) -> None:
        super().__init__(
            source,
            out,
            options,
            rows,
            record_bytes=lambda form: form.layer.plain_bytes,
            kept_bytes=held_bytes,
            num_rooms=NUM_ROOMS,
            number=peers.number,
            **memory,
        )
        self._peers = peers
        self._passes = own_passes(options, peers.number)
        self.experts.method = self
        self.experts.lockstep.enter = self.enter
        self._base = [parameter.data for parameter in self._parameters]
        self._versions = [[torch.empty_like(weight) for weight in self._base] for _ in (0, 1)]
        """Everything outside experts on both sides, as long as a step lasts."""
        most = max(form.layer.plain_bytes for form in self._tuned.forms)
        self._sides = [torch.empty(most, dtype=torch.uint8) for _ in (0, 1)]
        """The expert that is computed, on both sides."""
        self._entered = -1
        self._touched: set[Key] = set()
        self._pending: dict[Key, list[int]] = {}
        """Steps that an expert has yet to get, in their order."""
        self._sizes: dict[int, float] = {}
        """How far the steps went that some expert has yet to go: rate * (L+ - L-) / (2 epsilon)."""

    def step(self, number: int) -> dict[str, Any]:
        """One step; `loss` is the mean of both passes, `gradient_norm` that along the direction."""
        options, self._step = self._options, number + 1
        batches = self._rows.batches(number, options)
        num_learnt = learnt_tokens([labels for _, labels in batches])
        self._perturb_resident()
        passes = [partial(self._loss, *batches[micro], num_learnt) for _, micro in self._passes]
        own = self.experts.lockstep.run(passes, self.experts.answer)
        plus, minus = self._shared(dict(zip(self._passes, own, strict=True)))
        slope = (plus - minus) / (2 * options.epsilon)
        self._sizes[self._step] = options.rate_at(self._step) * slope
        self._move_resident()
        waited_for = {step for steps in self._pending.values() for step in steps}
        self._sizes = {step: size for step, size in self._sizes.items() if step in waited_for}
        loss = (plus + minus) / 2
        return {"loss": loss, "lm_loss": loss, "gradient_norm": abs(slope)}

    def _shared(self, own: dict[Pass, float]) -> tuple[float, float]:
        """Both losses of the step over all processes, whose touched experts are noted; sums in one order."""
        losses: dict[Pass, float] = {}
        for others, touched in self._peers.gather((own, self._touched)):
            losses |= others
            self._touched |= touched
        for key in sorted(self._touched):
            self._pending.setdefault(key, []).append(self._step)
        self._touched = set()
        plus, minus = (sum(losses[sign, micro] for micro in range(self._options.accumulation)) for sign in (0, 1))
        return plus, minus

    @torch.no_grad()
    def _loss(self, token_BS: torch.Tensor, label_BS: torch.Tensor, num_learnt: int) -> float:
        with torch.no_grad():
            return float(share_of_loss(self._model, token_BS, label_BS, num_learnt))

    def enter(self, number: int) -> None:
        """Let the model outside experts be what pass `number` sees."""
        sign, _ = self._passes[number]
        if sign != self._entered:
            for parameter, data in zip(self._parameters, self._versions[sign], strict=True):
                parameter.data = data
            self._entered = sign

    def _perturb_resident(self) -> None:
        for number, weight in enumerate(self._base):
            direction = Direction(self._options.seed, self._step, (RESIDENT, number))
            sides = [[version[number]] for version in self._versions]
            visit([weight], (), None, direction, self._options.epsilon, sides)

    def _move_resident(self) -> None:
        self._entered, size = -1, self._sizes[self._step]
        for number, (parameter, weight) in enumerate(zip(self._parameters, self._base, strict=True)):
            visit([weight], [(Direction(self._options.seed, self._step, (RESIDENT, number)), size)])
            parameter.data = weight

    def seen(self, layer: int, expert: int, stored: Weights) -> Callable[[int], Seen]:
        """An expert in its slot: brought up to date there, and perturbed in both ways."""
        form, seed = self._form(layer), self._options.seed
        steps = self._pending.pop((layer, expert), [])
        room = self._records.room() if steps else None
        visit(
            form.ordered(stored),
            [(Direction(seed, step, (layer + 1, expert)), self._sizes[step]) for step in steps],
            None if room is None else form.matrices(room),
            Direction(seed, self._step, (layer + 1, expert)),
            self._options.epsilon,
            sides := [form.matrices(side) for side in self._sides],
        )
        if room is not None:
            self._write_behind(layer, expert, room, steps[-1])
        self._touched.add((layer, expert))
        names = [parameter.name for parameter in form.parameters]
        seen = [Seen(dict(zip(names, matrices, strict=True))) for matrices in sides]
        return lambda number: seen[self._passes[number][0]]

    def _finish(self, layer: int, expert: int, stored: Weights) -> None:
        steps = self._pending.pop((layer, expert), [])
        owner = (layer + 1, expert)
        moves = [(Direction(self._options.seed, step, owner), self._sizes[step]) for step in steps]
        visit(self._form(layer).ordered(stored), moves)

    def take(self, layer: int, expert: int, seen: Sequence[Seen]) -> None:
        raise AssertionError("a method without a backward pass takes no gradients")

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Weights outside experts; for each process the table of records, and what experts have yet to get."""
        own = {
            "draws": DRAWS,
            "records": self._records.secure(),
            "pending": {f"{layer}.{expert}": steps for (layer, expert), steps in self._pending.items()},
            "sizes": {str(step): size for step, size in self._sizes.items()},
        }
        weights = {f"{number}": weight for number, weight in enumerate(self._base)}
        return weights, {"processes": self._peers.gather(own)}

    def restore(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Continue from a commit.

        Raises:
            KeyError, ValueError: if it is of another model.
        """
        own = facts["processes"][self._peers.number]
        if own.get("draws") != DRAWS:
            raise ValueError("this run draws directions as an earlier version did; begin it anew with another --out")
        self._restore([tensors[str(number)] for number in range(len(self._parameters))], own["records"])
        self._sizes = {int(step): float(size) for step, size in own["sizes"].items()}
        self._pending = {
            (int(layer), int(expert)): [int(step) for step in steps]
            for key, steps in own["pending"].items()
            for layer, expert in [key.split(".")]
        }


def own_passes(options: TuneOptions, number: int) -> list[Pass]:
    """The passes of one process: those of one side together, and both sides of a micro-batch in as few processes."""
    order = [(sign, micro) for micro in range(options.accumulation) for sign in (0, 1)]
    return sorted(order[number * options.own_passes :][: options.own_passes])


def held_bytes(opened: OpenedCheckpoint) -> int:
    """What the method holds besides the model: both perturbed versions of everything outside experts and of the expert
    that is computed, and rooms for records."""
    return 2 * weight_bytes(opened.model) + (2 + NUM_ROOMS) * max(opened.slot_bytes_L)
