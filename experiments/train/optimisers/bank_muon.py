"""Muon for banks of expert matrices, which `torch.optim.Muon` refuses: every matrix of a bank is orthogonalised alone.

Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon (momentum, Newton-Schulz with five steps); Liu et al. 2025
(Moonlight), arXiv:2502.16982, eq. 4 (the update's root mean square matched to AdamW's).

Shapes: N rows of a matrix, I inputs.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

# Jordan's quintic: steepest at zero, so that five steps bring small singular values near 1
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7
"""Least norm that a gradient is divided by, as in torch."""
ADAMW_RMS = 0.2
"""Root mean square of AdamW's updates in practice, from Moonlight, section 2.2."""


class BankMuon(Optimizer):
    """Muon whose parameters are stacks of matrices.

    Args:
        params: parameters, or groups of them; a group's `parts` says into how many matrices the rows of each of a
            bank's matrices are cut, such as 2 for gate and up.
        lr: learning rate, as AdamW's.
        weight_decay: decoupled decay per unit of learning rate.
        momentum: decay of the momentum, in [0, 1).
    """

    def __init__(self, params: Iterable, *, lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Move every parameter that has a gradient. Raises ValueError if a closure is given."""
        if closure is not None:
            raise ValueError("BankMuon takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        buffer = state["momentum_buffer"]
        buffer.lerp_(parameter.grad, 1 - group["momentum"])
        direction = parameter.grad.lerp(buffer, group["momentum"])  # Nesterov
        matrices = direction.unflatten(-2, (group["parts"], -1))
        update = orthogonalised(matrices).flatten(-3, -2)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.to(parameter.dtype), alpha=-group["lr"] * ADAMW_RMS * math.sqrt(max(matrices.shape[-2:])))


def orthogonalised(matrix_NI: Tensor) -> Tensor:
    """The nearest orthogonal matrices to a stack [..., N, I], roughly: singular values between about 0.5 and 1.5.

    Computed in bfloat16, as published; the result is in it.
    """
    a, b, c = COEFFICIENTS
    x = matrix_NI.bfloat16().flatten(0, -3)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).view_as(matrix_NI)
