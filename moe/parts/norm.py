"""RMSNorm whose weight follows the dtype of its input, so that autocast keeps the fused path.

Training on a CPU has an autograd function of its own, because torch's norm runs there as a chain of products over the
whole input, forward and backward.

Shapes: N rows, D width; M rows of one block.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from .cpu_training import is_large_cpu_training

# numbers of a block, 2 MiB of float32, so that what lies between two of its products stays in the cache: smaller blocks
# make more calls. Used by both records of training throughput; no record of other values
BLOCK_NUMBERS = 1 << 19


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm over the last dimension. Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4."""

    def forward(self, x: Tensor) -> Tensor:
        weight_D = self.weight.to(x.dtype)
        if is_large_cpu_training(x, weight_D):
            return _BlockwiseNorm.apply(x.reshape(-1, x.shape[-1]), weight_D, self.eps).view(x.shape)
        return rms_norm(x, self.normalized_shape, weight_D, self.eps)


class _BlockwiseNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        N, D = x_ND.shape
        scale_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True, dtype=_wide(x_ND.dtype))
        scale_N1.square_().div_(D).add_(eps).rsqrt_()
        y_ND = torch.empty_like(x_ND)
        wide_D = weight_D.to(scale_N1.dtype)
        for rows in _blocks(N, D):
            y_ND[rows] = torch.mul(x_ND[rows], scale_N1[rows]).mul_(wide_D)
        ctx.save_for_backward(x_ND, weight_D, scale_N1)
        return y_ND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_D, scale_N1 = ctx.saved_tensors
        N, D = x_ND.shape
        wide_D = weight_D.to(scale_N1.dtype)
        grad_x_ND, grad_weight_D = torch.empty_like(x_ND), torch.zeros_like(wide_D)
        with torch.autocast("cpu", enabled=False):
            for rows in _blocks(N, D):
                grad_MD, scale_M1 = grad_ND[rows].to(wide_D.dtype), scale_N1[rows]
                normed_MD = x_ND[rows] * scale_M1
                product_MD = grad_MD * normed_MD
                grad_weight_D += product_MD.sum(dim=0)
                mean_M1 = torch.mv(product_MD, wide_D).div_(D)[:, None]
                through_MD = torch.mul(grad_MD, wide_D, out=product_MD)
                grad_x_ND[rows] = through_MD.addcmul_(normed_MD, mean_M1, value=-1).mul_(scale_M1)
        return grad_x_ND, grad_weight_D.to(weight_D.dtype), None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _blocks(num_rows: int, width: int) -> Iterator[slice]:
    size = max(1, BLOCK_NUMBERS // width)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
