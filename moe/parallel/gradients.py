"""Gradients of a split model: finish what FSDP2 leaves alone, and clip all by one norm."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import get_total_norm

from .shard import Split

EPSILON = 1e-6
"""Beside the norm when it divides, as in `torch.nn.utils.clip_grads_with_norm_`."""


def average_gradients(split: Split) -> None:
    """Turn the gradients that FSDP2 leaves alone into means over all processes, by one all-reduce; call it once.

    A parameter that no process used keeps no gradient, as with one process: the optimiser leaves it alone.
    """
    for parameter in split.only:
        if parameter.grad is not None:  # the sum over the tokens of all processes already
            parameter.grad /= split.layout.processes
    if split.whole:
        _average(split.whole, split.layout.processes)


def _average(parameters: Sequence[nn.Parameter], processes: int) -> None:
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    used = grads[0].new_tensor([p.grad is not None for p in parameters])
    flat = torch.cat([used, *(grad.flatten() for grad in grads)])
    distributed.all_reduce(flat)
    used, flat = flat[: len(parameters)], flat[len(parameters) :] / processes
    for parameter, is_used, grad in zip(parameters, used, flat.split([g.numel() for g in grads]), strict=True):
        parameter.grad = grad.view_as(parameter).clone() if is_used else None


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `largest`; returns the norm before.

    torch's own `clip_grad_norm_` refuses parameters that are split in different ways. Here every element of a split
    gradient is on one process, so one all-reduce of the squares is enough.

    Args:
        parameters: of one model, split over all processes or whole.
        largest: positive.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [grad.to_local() for grad in grads if hasattr(grad, "to_local")]
    whole = [grad for grad in grads if not hasattr(grad, "to_local")]
    square = get_total_norm(parts).square().to(parts[0])
    distributed.all_reduce(square)
    norm = (square + get_total_norm(whole).square()).sqrt() if whole else square.sqrt()
    for grad in (*parts, *whole):
        grad *= (largest / (norm + EPSILON)).clamp(max=1.0)
    return norm
