"""Expert slicing: each process holds some hidden units of every expert, and all add up what theirs give.

An expert's gated units are independent of each other up to the down projection, a sum over them. So F / n units
on each of n processes and one all-reduce of [T, D] compute the whole expert; it splits experts that are too large for
one device, where expert parallelism splits only their number.

Source: Rajbhandari et al. 2022 (DeepSpeed-MoE), arXiv:2201.05596, section 5.1, "expert-slicing".

Shapes: T tokens, D model width, F expert width, E experts.
"""

from typing import Any

import torch
from torch import Tensor, distributed, nn


def slice_of(bank: nn.Module, part: int, parts: int) -> nn.Module:
    """One process's share of a bank of plain experts, as a bank of the same kind. Changes `bank`, and returns it.

    Args:
        bank: has `gate_up_proj` [E, 2F, D] and `down_proj` [E, D, F].
        part: which share, 0 to parts - 1.
        parts: of equal width, so they divide F.

    Raises:
        ValueError: if the parts do not divide the width, or there is no such part.
    """
    F = bank.down_proj.shape[-1]
    if parts < 1 or F % parts or not 0 <= part < parts:
        raise ValueError(
            f"parts must divide the {F} hidden units of an expert, and part must be one of them; got {part} of {parts}"
        )
    gate, up = (half.chunk(parts, dim=1)[part] for half in bank.gate_up_proj.detach().chunk(2, dim=1))
    bank.gate_up_proj = nn.Parameter(torch.cat([gate, up], dim=1))
    bank.down_proj = nn.Parameter(bank.down_proj.detach().chunk(parts, dim=2)[part].contiguous())
    return bank


class SlicedExperts(nn.Module):
    """A bank of which this process computes a slice; a call is a collective of the group, over the same tokens.

    Args:
        bank: this process's slice, from `slice_of`.
        group: the processes that hold the slices; None for all.
    """

    def __init__(self, bank: nn.Module, group: Any = None) -> None:
        super().__init__()
        self.bank, self.group = bank, group

    @property
    def gate_up_proj(self) -> Tensor:
        """Of this slice, [E, 2F / parts, D]."""
        return self.bank.gate_up_proj

    @property
    def down_proj(self) -> Tensor:
        """Of this slice, [E, D, F / parts]."""
        return self.bank.down_proj

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """[T, D]: the whole experts' weighted sum, on every process."""
        x_TD, weight_TK = (_SumOfGradients.apply(tensor, self.group) for tensor in (x_TD, weight_TK))
        return _SumOfValues.apply(self.bank(x_TD, expert_TK, weight_TK), self.group)


class _SumOfValues(torch.autograd.Function):
    """The sum over processes; each slice's gradient is the sum's own."""

    @staticmethod
    def forward(ctx: Any, y_TD: Tensor, group: Any) -> Tensor:
        total = y_TD.clone()
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return grad_TD, None


class _SumOfGradients(torch.autograd.Function):
    """What all processes read alike, whose gradient is the sum of what each slice asks for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        distributed.all_reduce(total, group=ctx.group)
        return total, None
