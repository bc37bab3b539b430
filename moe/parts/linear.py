"""Products of matrices on a CPU, by the library that is quickest there.

Shapes: N rows, I inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from routing import is_transformed

from .cpu_training import is_large_cpu_training
from .product_library import PRODUCTS, Library, library_of


def matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """`left @ right` of two matrices, without gradient.

    Args:
        left: [N, I], any strides.
        right: [I, O], any strides, in the same dtype.
        out: where the product goes, if it is to lie somewhere.
    """
    library = library_for(left)
    if library == "torch":
        return torch.mm(left, right, out=out)
    product = PRODUCTS[library](left, right)
    return product if out is None else out.copy_(product)


def library_for(x: Tensor) -> Library:
    """Who multiplies such a tensor: torch itself on other devices, while compiling, and within transforms."""
    is_plain = x.device.type == "cpu" and not torch.compiler.is_compiling() and not is_transformed(x)
    return library_of(x.dtype) if is_plain else "torch"


def builds_primitives(x: Tensor) -> bool:
    """Whether oneDNN multiplies such a tensor, which prepares itself anew for each number of rows."""
    library = library_for(x)
    return library == "onednn" or (library == "torch" and x.dtype == torch.bfloat16)


class Linear(nn.Linear):
    """A linear layer whose training on a CPU uses `matmul`; everywhere else it is torch's own."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        is_plain = self.weight.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)
        if is_plain and library_for(x) != "torch" and is_large_cpu_training(x, self.weight):
            y = _Linear.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
            return y if self.bias is None else y + self.bias
        return linear(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, weight_OI)
        return matmul(x_NI, weight_OI.T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_NI, weight_OI = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        grad_x_NI = matmul(grad_NO, weight_OI) if needs_x else None
        return grad_x_NI, matmul(grad_NO.T, x_NI) if needs_weight else None
