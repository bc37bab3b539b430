"""AdamW on one flat vector at a time, and the steps that it missed.

Experts that no token of a step visits have a gradient of zero, and AdamW moves them all the same: moments decay, and
what is left of them moves the weights. A fetched expert makes up for the steps that it missed, each with a gradient of
zero, by the same kernel. AdamW is elementwise, so the result is bit-equal to that of a resident model, whose tensors
hold all experts.

Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw

EPS = 1e-8
"""Added to the root of the second moment; the default of the paper and of torch."""


@dataclass(eq=False)
class AdamVector:
    """Some parameters with their moments, all float32 and flat.

    Args:
        value: the parameters, float32.
        mean, square: decayed means of gradients and of their squares.
    """

    value: torch.Tensor
    mean: torch.Tensor
    square: torch.Tensor

    @classmethod
    def begun(cls, value: torch.Tensor) -> "AdamVector":
        """Parameters that no step has changed."""
        return cls(value, torch.zeros_like(value), torch.zeros_like(value))


@dataclass(frozen=True)
class AdamW:
    """The settings of a run's AdamW.

    Args:
        rate_at: learning rate of a step, from 1.
        beta1, beta2: decay rates of the moments.
        weight_decay: of matrices.
    """

    rate_at: Callable[[int], float]
    beta1: float
    beta2: float
    weight_decay: float

    @torch.no_grad()
    def step(self, vector: AdamVector, grad: torch.Tensor, step: int, *, decays: bool = True) -> None:
        """Change a vector by step number `step`, from 1.

        Args:
            vector: after step `step - 1`.
            grad: of the step, float32, clipped.
            step: which.
            decays: whether the weight decay is for these parameters.
        """
        adamw(
            [vector.value],
            [grad],
            [vector.mean],
            [vector.square],
            [],
            [torch.tensor(float(step - 1))],
            fused=True,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=self.rate_at(step),
            weight_decay=self.weight_decay if decays else 0.0,
            eps=EPS,
            maximize=False,
        )

    def catch_up(self, vector: AdamVector, after: int, upto: int) -> None:
        """Do the steps after number `after` up to `upto`, each with a gradient of zero."""
        zero = torch.zeros_like(vector.value)
        for step in range(after + 1, upto + 1):
            self.step(vector, zero, step)
