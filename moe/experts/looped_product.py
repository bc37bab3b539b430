"""Each group of rows times its own matrix: a loop over the groups that have rows, with an exact backward pass.

On a CPU this does what `torch.nn.functional.grouped_mm` does there, without its traps: every dtype, any strides,
zeros in the rows after the last group, and no work for groups without rows.

Shapes: N rows sorted by group, E groups, I inputs, O outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from routing import is_transformed

from .sorted_rows import spans


def looped_product(x_NI: Tensor, right_EIO: Tensor, ends: Sequence[int] | Tensor) -> Tensor:
    """Multiply rows `ends[e - 1] .. ends[e]` by `right[e]`.

    Args:
        x_NI: rows sorted by group.
        right_EIO: one matrix per group, any strides, in the dtype of `x_NI`.
        ends: the row after each group's last one: numbers, or an integer tensor (needed under `torch.compile`).

    Returns:
        [N, O]; rows after the last group are zero.
    """
    if is_transformed(x_NI, right_EIO):
        return _product_of_all(x_NI, right_EIO, ends)
    if isinstance(ends, Tensor):
        return torch.ops.expertier.looped_product(x_NI, right_EIO, ends)
    if torch.is_grad_enabled() and (x_NI.requires_grad or right_EIO.requires_grad):
        return _LoopedProduct.apply(x_NI, right_EIO, ends)
    return _multiply(x_NI, right_EIO, ends)


def _product_of_all(x_NI: Tensor, right_EIO: Tensor, ends: Sequence[int] | Tensor) -> Tensor:
    """Every row by every matrix, E times the work, of operations that `torch.func` batches and differentiates."""
    end_E = torch.as_tensor(ends, device=x_NI.device)
    start_E = torch.cat([torch.zeros_like(end_E[:1]), end_E[:-1]])
    place_N = torch.arange(len(x_NI), device=x_NI.device)
    is_own_EN = (place_N >= start_E[:, None]) & (place_N < end_E[:, None])
    return torch.where(is_own_EN[..., None], x_NI @ right_EIO, 0.0).sum(dim=0)


class _LoopedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, right_EIO: Tensor, ends: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x_NI, right_EIO)
        ctx.ends = ends
        return _multiply(x_NI, right_EIO, ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_NI, right_EIO = ctx.saved_tensors
        needs_x, needs_right, _ = ctx.needs_input_grad
        grad_x_NI = _multiply(grad_NO, right_EIO.transpose(1, 2), ctx.ends) if needs_x else None
        grad_right_EIO = _multiply_back(x_NI, grad_NO, right_EIO, ctx.ends) if needs_right else None
        return grad_x_NI, grad_right_EIO, None


def _multiply(x_NI: Tensor, right_EIO: Tensor, ends: Sequence[int]) -> Tensor:
    y_NO = x_NI.new_empty(x_NI.shape[0], right_EIO.shape[2])
    for group, rows in spans(ends):
        torch.mm(x_NI[rows], right_EIO[group], out=y_NO[rows])
    y_NO[ends[-1] :].zero_()
    return y_NO


def _multiply_back(x_NI: Tensor, grad_NO: Tensor, right_EIO: Tensor, ends: Sequence[int]) -> Tensor:
    grad_EIO = torch.empty_like(right_EIO)
    first_idle = 0
    for group, rows in spans(ends):
        grad_EIO[first_idle:group].zero_()
        # checkpoints mostly store [E, O, I], whose gradient this writes without a copy
        torch.mm(grad_NO[rows].T, x_NI[rows], out=grad_EIO[group].T)
        first_idle = group + 1
    grad_EIO[first_idle:].zero_()
    return grad_EIO


@torch.library.custom_op("expertier::looped_product", mutates_args=())
def _product_operator(x: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return _multiply(x, right, ends.tolist())


@_product_operator.register_fake
def _(x: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], right.shape[2])


@torch.library.custom_op("expertier::looped_product_backward", mutates_args=())
def _backward_operator(grad: Tensor, x: Tensor, right: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    numbers = ends.tolist()
    return _multiply(grad, right.transpose(1, 2), numbers), _multiply_back(x, grad, right, numbers)


@_backward_operator.register_fake
def _(grad: Tensor, x: Tensor, right: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(right)


def _keep_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *torch.ops.expertier.looped_product_backward(grad, *ctx.saved_tensors), None


_product_operator.register_autograd(_differentiate, setup_context=_keep_for_backward)
