"""What fine-tuning changed, made sparse and added up: task vectors of one tensor.

A task vector is the difference of a fine-tuned tensor from that of the base model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from routing.ground.expect import expect_name

from ..flags import flag

Generators = Sequence[torch.Generator]


@dataclass(frozen=True, kw_only=True)
class TaskVectors:
    """How task vectors are made sparse and merged.

    Args:
        sparsify: a key of `SPARSIFIERS`.
        density: share of the entries of each tensor that stay, 0 < density <= 1.
        outliers: share of the largest entries that `breadcrumbs` leaves out, 0 <= outliers < 1 - density.
        scale: factor of the merged task vector before it is added to the base.

    Raises:
        ValueError: if a value is out of range.
    """

    sparsify: str = flag("Of task vectors: ties, dare or breadcrumbs.", default="ties")
    density: float = flag("Share of each task vector that stays.", default=0.2, min=0.0, max=1.0)
    outliers: float = flag("Share of the largest entries that breadcrumbs leaves out.", default=0.01, min=0.0, max=1.0)
    scale: float = flag("Factor of the merged task vector.", default=1.0)

    def __post_init__(self) -> None:
        expect_name(self.sparsify, SPARSIFIERS, "way to sparsify task vectors (--sparsify)")
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1]; got {self.density:g}")
        if self.sparsify == "breadcrumbs" and not 0 <= self.outliers <= 1 - self.density:
            raise ValueError(f"outliers must lie in 0..{1 - self.density:g} (1 - density); got {self.outliers:g}")


def merged(
    base: Tensor, tuned: Sequence[Tensor], weights: Sequence[float], how: TaskVectors, seeds: Generators
) -> Tensor:
    """The base tensor plus the merged task vectors of one tensor, in float64.

    Args:
        base: the base model's tensor.
        tuned: of each fine-tuned model.
        weights: of each model, with sum 1.
        how: which entries stay, and the scale.
        seeds: random numbers of each model, used by `dare`.
    """
    tasks = [one.double() - base.double() for one in tuned]
    return base.double() + how.scale * SPARSIFIERS[how.sparsify](tasks, weights, how, seeds)


def ties(tasks: Sequence[Tensor], weights: Sequence[float], how: TaskVectors, seeds: Generators) -> Tensor:
    """Trim each task vector to its largest entries, elect a sign per entry, average those that have it.

    Source: Yadav et al. 2023 (TIES-Merging), arXiv:2306.01708, algorithm 1; trimmed per tensor here, over the whole
        model there.
    """
    trimmed = torch.stack([task * _largest(task, how.density) for task in tasks])
    weight = torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * tasks[0].ndim)
    elected = (weight * trimmed).sum(dim=0).sign()
    agrees = (trimmed.sign() == elected) & (elected != 0)
    total = (weight * agrees).sum(dim=0)
    return (weight * trimmed * agrees).sum(dim=0) / torch.where(total > 0, total, 1.0)


def dare(tasks: Sequence[Tensor], weights: Sequence[float], how: TaskVectors, seeds: Generators) -> Tensor:
    """Drop entries at random and divide the others by the share that stays; then the weighted mean.

    Source: Yu et al. 2023 (DARE), arXiv:2311.03099, section 3; the drop rate there is 1 - density.
    """
    kept = [
        task * (torch.rand(task.shape, generator=seed) < how.density) / how.density
        for task, seed in zip(tasks, seeds, strict=True)
    ]
    return _mean(kept, weights)


def breadcrumbs(tasks: Sequence[Tensor], weights: Sequence[float], how: TaskVectors, seeds: Generators) -> Tensor:
    """Leave out the largest entries of each tensor and the smallest ones, keep what lies between; weighted mean.

    Source: Davari and Belilovsky 2023 (Model Breadcrumbs), arXiv:2312.06795, section 3.
    """
    kept = [task * (_largest(task, how.density + how.outliers) & ~_largest(task, how.outliers)) for task in tasks]
    return _mean(kept, weights)


def _largest(task: Tensor, share: float) -> Tensor:
    """Which entries are among the largest by magnitude; of equal ones any."""
    mask = torch.zeros(task.numel(), dtype=torch.bool)
    mask[task.abs().flatten().topk(round(share * task.numel())).indices] = True
    return mask.view(task.shape)


def _mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return sum((weight * one for weight, one in zip(weights, tensors, strict=True)), torch.zeros_like(tensors[0]))


Sparsifier = Callable[[Sequence[Tensor], Sequence[float], TaskVectors, Generators], Tensor]
SPARSIFIERS: dict[str, Sparsifier] = {"ties": ties, "dare": dare, "breadcrumbs": breadcrumbs}
