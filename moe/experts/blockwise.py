"""SwiGLU experts on a CPU, in blocks of one expert's rows: intermediate results between two products stay in the cache.

The mathematics is that of `kernels/README.md`. The backward pass recomputes the activation from the pre-activation, so
only the input, the pre-activation and the routing are kept. Products are in the number format of the experts (or of
autocast), everything else is in float32 at least.

Where oneDNN multiplies (bfloat16, and float32 on some processors), blocks are padded with zero rows to a multiple of
`ROWS_TOGETHER`. oneDNN builds a new primitive for each new row count, which costs more than the product itself; padding
keeps the number of different row counts small.

Shapes: T tokens, K slots, N = T * K routed rows sorted by expert, P places of rows (padding included), M places of one
block, E experts, D model width, F expert width, O = 2F.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..parts.linear import builds_primitives, matmul
from .blocks import Block, blocks_of

# multiple of rows in a block: a larger one pads more rows, a smaller one lets oneDNN build more primitives; no record
# of other values
ROWS_TOGETHER = 64
# most numbers in a block's widest tensor, 2 MiB of float32: larger blocks leave the cache, smaller ones make more
# calls. Set for the records 2026-11-21 (Intel) and 2026-11-29 (AMD) of training throughput; no record of other values
BLOCK_NUMBERS = 1 << 19
# rows of a block at least, however wide the experts: below, products are too low for their threads; no record of others
LEAST_ROWS = 256


def blockwise_experts(
    x_TD: Tensor,
    combine_TK: Tensor,
    up_EDO: Tensor,
    down_EFD: Tensor,
    order_N: Tensor,
    ends: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Weighted sum of the chosen SwiGLU experts' outputs.

    Args:
        x_TD: tokens; their dtype is that of the result.
        combine_TK: floating-point combine weights; no normalisation is assumed.
        up_EDO: gate and up projection, gates before ups, as the right factor of a product; any strides.
        down_EFD: the down projection likewise.
        order_N: the routed row (`token * K + k`) at each place of the order by expert; padding rows come last.
        ends: the row after each expert's last one.
        dtype: the number format of the products.

    Returns:
        [T, D] in the dtype of `x_TD`.
    """
    together = ROWS_TOGETHER if builds_primitives(down_EFD.new_empty(0, dtype=dtype)) else 1
    fitting = BLOCK_NUMBERS // up_EDO.shape[2] // ROWS_TOGETHER * ROWS_TOGETHER
    blocks = blocks_of(ends, max(LEAST_ROWS, fitting), together)
    return _BlockwiseExperts.apply(x_TD, combine_TK, up_EDO, down_EFD, order_N, blocks, dtype)


class _BlockwiseExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        combine_TK: Tensor,
        up_EDO: Tensor,
        down_EFD: Tensor,
        order_N: Tensor,
        blocks: list[Block],
        dtype: torch.dtype,
    ) -> Tensor:
        keeps = any(ctx.needs_input_grad)
        rows = _Rows(order_N, combine_TK, x_TD.dtype)
        pre_PO = x_TD.new_empty(blocks[-1].places.stop if blocks and keeps else 0, up_EDO.shape[2], dtype=dtype)
        y_TD = torch.zeros_like(x_TD, dtype=rows.wide)
        with torch.autocast("cpu", enabled=False):
            given_TD, up, down = x_TD.to(dtype), up_EDO.to(dtype), down_EFD.to(dtype)
            for block in blocks:
                out = pre_PO[block.places] if keeps else None
                pre_MO = matmul(rows.gather(given_TD, block), up[block.expert], out=out)
                gate_MF, up_MF = pre_MO.to(rows.wide).chunk(2, dim=1)
                y_MD = matmul(silu(gate_MF).mul_(up_MF).to(dtype), down[block.expert])
                rows.add(y_TD, y_MD.to(rows.wide) * rows.combine(block), block)
        if keeps:
            # like autocast's own linear layers, rather than cast all experts again
            ctx.save_for_backward(x_TD, up_EDO, down_EFD, pre_PO, up, down)
            ctx.rows, ctx.blocks = rows, blocks
        return y_TD.to(x_TD.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _Gradients(grad_TD, *ctx.saved_tensors, ctx.rows, ctx.needs_input_grad)
        with torch.autocast("cpu", enabled=False):
            for block in ctx.blocks:
                gradients.add_block(block)
            return *gradients.finished(), None, None, None


class _Rows:
    """Which token each sorted row belongs to, and its combine weight."""

    def __init__(self, order_N: Tensor, combine_TK: Tensor, dtype: torch.dtype) -> None:
        self.order_N, self.combine_TK = order_N, combine_TK.detach()
        self.wide = torch.promote_types(torch.promote_types(combine_TK.dtype, dtype), torch.float32)
        self.token_N = order_N // combine_TK.shape[1]
        self.combine_N1 = self.combine_TK.to(self.wide).reshape(-1, 1)[order_N]

    def gather(self, x_TD: Tensor, block: Block) -> Tensor:
        """[M, D]: the tokens of a block, zeros in the padding."""
        return _filled(x_TD.index_select(0, self.token_N[block.rows]), block)

    def combine(self, block: Block) -> Tensor:
        """[M, 1]: the combine weights of a block, zeros in the padding."""
        return _filled(self.combine_N1[block.rows], block)

    def add(self, sum_TD: Tensor, y_MD: Tensor, block: Block) -> None:
        """Add a block's rows to their tokens."""
        sum_TD.index_add_(0, self.token_N[block.rows], y_MD[: block.num_rows])


def _filled(rows: Tensor, block: Block) -> Tensor:
    missing = block.num_places - block.num_rows
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows


class _Gradients:
    """The gradients summed so far by the backward pass; None where none is asked for."""

    def __init__(
        self,
        grad_TD: Tensor,
        x_TD: Tensor,
        up_EDO: Tensor,
        down_EFD: Tensor,
        pre_PO: Tensor,
        cast_up_EDO: Tensor,
        cast_down_EFD: Tensor,
        rows: _Rows,
        needs: Sequence[bool],
    ) -> None:
        dtype = pre_PO.dtype
        self.grad_TD, self.x_TD = grad_TD.to(dtype), x_TD.to(dtype)
        self.up_EDO, self.down_EFD = cast_up_EDO, cast_down_EFD
        self.x_dtype = x_TD.dtype
        self.pre_PO, self.rows = pre_PO, rows
        needs_x, needs_combine, needs_up, needs_down, *_ = needs
        self.grad_x_TD = torch.zeros_like(x_TD, dtype=rows.wide) if needs_x else None
        self.dot_N = rows.combine_N1.new_zeros(len(rows.order_N)) if needs_combine else None
        self.grad_up = _WeightGradient(up_EDO) if needs_up else None
        self.grad_down = _WeightGradient(down_EFD) if needs_down else None

    def add_block(self, block: Block) -> None:
        """Back through one block: activation, combine weights, both projections."""
        rows, dtype = self.rows, self.pre_PO.dtype
        up, down = self.up_EDO[block.expert], self.down_EFD[block.expert]
        pre_MO = self.pre_PO[block.places].to(rows.wide)
        gate_MF, up_MF = pre_MO.chunk(2, dim=1)
        inner_MF, combine_M1 = silu(gate_MF), rows.combine(block)
        activated_MF = inner_MF * up_MF

        grad_MD = rows.gather(self.grad_TD, block)
        raw_MF = matmul(grad_MD, down.T).to(rows.wide)
        if self.dot_N is not None:
            self.dot_N[block.rows] = torch.linalg.vecdot(raw_MF, activated_MF)[: block.num_rows]
        if self.grad_down is not None:
            self.grad_down.add(block.expert, activated_MF.mul_(combine_M1).to(dtype), grad_MD)
        if self.grad_up is None and self.grad_x_TD is None:
            return
        raw_MF = raw_MF * combine_M1
        grad_pre_MO = torch.empty_like(pre_MO)
        grad_gate_MF, grad_up_MF = grad_pre_MO.chunk(2, dim=1)
        torch.mul(raw_MF, inner_MF, out=grad_up_MF)
        torch.ops.aten.silu_backward.grad_input(raw_MF.mul_(up_MF), gate_MF, grad_input=grad_gate_MF)
        grad_pre_MO = grad_pre_MO.to(dtype)
        if self.grad_up is not None:
            self.grad_up.add(block.expert, rows.gather(self.x_TD, block), grad_pre_MO)
        if self.grad_x_TD is not None:
            rows.add(self.grad_x_TD, matmul(grad_pre_MO, up.T).to(rows.wide), block)

    def finished(self) -> tuple[Tensor | None, ...]:
        """Gradients of the tokens, combine weights and projections."""
        grad_x_TD = None if self.grad_x_TD is None else self.grad_x_TD.to(self.x_dtype)
        grad_combine_TK = None
        if self.dot_N is not None:
            combine_TK = self.rows.combine_TK
            dot_N = torch.empty_like(self.dot_N)
            dot_N[self.rows.order_N] = self.dot_N
            grad_combine_TK = dot_N.view(combine_TK.shape).to(combine_TK.dtype)
        weights = (None if gradient is None else gradient.finished() for gradient in (self.grad_up, self.grad_down))
        return grad_x_TD, grad_combine_TK, *weights


class _WeightGradient:
    """Sums over the rows of each expert, which come expert by expert; experts without rows get zeros."""

    def __init__(self, right_EIO: Tensor) -> None:
        self.grad_EIO = torch.empty_like(right_EIO)
        self.num_begun = 0

    def add(self, expert: int, left_MI: Tensor, grad_MO: Tensor) -> None:
        """Add one block's share."""
        # checkpoints mostly store [E, O, I], whose gradient this writes without a copy
        grad_OI = self.grad_EIO[expert].T
        if expert < self.num_begun:
            grad_OI += matmul(grad_MO.T, left_MI)
            return
        self.grad_EIO[self.num_begun : expert].zero_()
        self.num_begun = expert + 1
        if grad_OI.dtype == left_MI.dtype:
            matmul(grad_MO.T, left_MI, out=grad_OI)
        else:
            grad_OI.copy_(matmul(grad_MO.T, left_MI))

    def finished(self) -> Tensor:
        """[E, I, O]."""
        self.grad_EIO[self.num_begun :].zero_()
        return self.grad_EIO
