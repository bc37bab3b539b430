"""Products of float32 matrices on a CPU, by the library that uses the whole width of the processor's vectors.

MKL, which is behind `torch.mm`, uses half of it on AVX-512 processors that Intel did not make; oneDNN, which torch has
as well but takes for bfloat16 only, uses all of it.

Shapes: N rows, I inputs, O outputs.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from routing import is_transformed, processor_fact

from .cpu_training import is_large_cpu_training


def matmul(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """`left @ right` of two matrices, without gradient.

    Args:
        left: [N, I], any strides.
        right: [I, O], any strides, in the same dtype.
        out: where the product goes, if it is to lie somewhere.
    """
    if not suits_onednn(left):
        return torch.mm(left, right, out=out)
    product = torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
    return product if out is None else out.copy_(product)


def suits_onednn(x: Tensor) -> bool:
    """Whether oneDNN multiplies such a tensor faster than MKL does."""
    is_plain = x.dtype == torch.float32 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    return is_plain and mkl_is_half_as_wide() and not is_transformed(x)


@functools.cache
def mkl_is_half_as_wide() -> bool:
    """Whether torch multiplies by MKL on an AVX-512 processor that is not Intel's, and has oneDNN besides."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    is_other = processor_fact("vendor_id") not in ("", "GenuineIntel")
    return has_both and is_other and torch.backends.cpu.get_cpu_capability() == "AVX512"


class Linear(nn.Linear):
    """A linear layer without bias whose training on a CPU uses `matmul`; everywhere else it is torch's own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        is_plain = self.weight.dtype == x.dtype and not torch.is_autocast_enabled(x.device.type)
        if is_plain and suits_onednn(x) and is_large_cpu_training(x, self.weight):
            return _Linear.apply(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return linear(x, self.weight)


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
