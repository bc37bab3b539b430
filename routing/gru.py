"""The GRU cell that routers share. On a CPU it runs in blocks of rows, whose gates are computed where they lie.

torch's own cell on a CPU gives every product, sum and gate of all rows new memory, which costs more than the products.

Shapes: T tokens, p state width; M rows of one block.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

# bounds the memory of gates without gradient; smaller blocks cost more in waiting for threads than the cache saves
BLOCK_ROWS = 4096
# below, torch's own cell has less to prepare
FEWEST_ROWS = 128
_aten = torch.ops.aten


def gru_cell(x_Tp: Tensor, state_Tp: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
    """The state after one step.

    Args:
        x_Tp: inputs.
        state_Tp: the state before; None is zero.
        weights: `weight_ih` [3p, p], `weight_hh` [3p, p], `bias_ih` [3p] and `bias_hh` [3p] of `torch.nn.GRUCell`.

    Returns:
        [T, p].

    Source: Cho et al. 2014, arXiv:1406.1078, eqs. 5-8, with the gate order and biases of `torch.nn.GRUCell`.
    """
    if x_Tp.device.type == "cpu" and len(x_Tp) >= FEWEST_ROWS and not torch.compiler.is_compiling():
        return _BlockwiseCell.apply(x_Tp, state_Tp, *weights)
    return torch.gru_cell(x_Tp, torch.zeros_like(x_Tp) if state_Tp is None else state_Tp, *weights)


class _BlockwiseCell(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_Tp: Tensor,
        state_Tp: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
    ) -> Tensor:
        T = len(x_Tp)
        keeps = any(ctx.needs_input_grad)
        gates = _Gates.empty(x_Tp, T if keeps else min(T, BLOCK_ROWS))
        weights = (weight_ih, weight_hh, bias_ih, bias_hh)
        after_Tp = torch.empty_like(x_Tp)
        for rows in _blocks(T):
            block = gates.rows(rows if keeps else slice(0, rows.stop - rows.start))
            before_Mp = None if state_Tp is None else state_Tp[rows]
            _compute(block, x_Tp[rows], before_Mp, weights)
            if before_Mp is None:
                torch.addcmul(block.new, block.update, block.new, value=-1, out=after_Tp[rows])
            else:
                torch.lerp(block.new, before_Mp, block.update, out=after_Tp[rows])
        if keeps:
            ctx.save_for_backward(x_Tp, state_Tp, weight_ih, weight_hh, *gates)
        return after_Tp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_Tp: Tensor) -> tuple[Tensor | None, ...]:
        x_Tp, state_Tp, weight_ih, weight_hh, *saved = ctx.saved_tensors
        gates = _Gates(*saved)
        T, p = x_Tp.shape
        grad_x, grad_state = torch.empty_like(x_Tp), torch.empty_like(x_Tp)
        grad_ih, grad_hh = torch.zeros_like(weight_ih), torch.zeros_like(weight_hh)
        grad_bias_ih, grad_bias_hh = weight_ih.new_zeros(3 * p), weight_hh.new_zeros(3 * p)
        workspace = _Gates.empty(x_Tp, min(T, BLOCK_ROWS))
        with torch.autocast("cpu", enabled=False):
            for rows in _blocks(T):
                block = workspace.rows(slice(0, rows.stop - rows.start))
                before_Mp = None if state_Tp is None else state_Tp[rows]
                _differentiate(block, grad_state[rows], grad_Tp[rows], before_Mp, gates.rows(rows))
                bias_2p = block.reset_update.sum(dim=0)
                grad_bias_ih += torch.cat([bias_2p, block.new.sum(dim=0)])
                grad_bias_hh += torch.cat([bias_2p, block.of_state.sum(dim=0)])
                grad_ih[: 2 * p].addmm_(block.reset_update.T, x_Tp[rows])
                grad_ih[2 * p :].addmm_(block.new.T, x_Tp[rows])
                torch.mm(block.reset_update, weight_ih[: 2 * p], out=grad_x[rows]).addmm_(block.new, weight_ih[2 * p :])
                if before_Mp is not None:
                    grad_hh[: 2 * p].addmm_(block.reset_update.T, before_Mp)
                    grad_hh[2 * p :].addmm_(block.of_state.T, before_Mp)
                    grad_state[rows].addmm_(block.reset_update, weight_hh[: 2 * p])
                    grad_state[rows].addmm_(block.of_state, weight_hh[2 * p :])
        return grad_x, None if state_Tp is None else grad_state, grad_ih, grad_hh, grad_bias_ih, grad_bias_hh


class _Gates(NamedTuple):
    """Of some rows: reset and update gate [M, 2p], the new state [M, p], and the former state's part of it [M, p]."""

    reset_update: Tensor
    new: Tensor
    of_state: Tensor

    @classmethod
    def empty(cls, like_Tp: Tensor, num_rows: int) -> Self:
        """Memory for so many rows."""
        p = like_Tp.shape[1]
        return cls(*(like_Tp.new_empty(num_rows, width) for width in (2 * p, p, p)))

    def rows(self, rows: slice) -> Self:
        """Those of some rows."""
        return type(self)(*(part[rows] for part in self))

    @property
    def reset(self) -> Tensor:
        return self.reset_update[:, : self.new.shape[1]]

    @property
    def update(self) -> Tensor:
        return self.reset_update[:, self.new.shape[1] :]


def _compute(block: _Gates, x_Mp: Tensor, state_Mp: Tensor | None, weights: Sequence[Tensor]) -> None:
    """Fill in the gates of one block."""
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    p = x_Mp.shape[1]
    torch.mm(x_Mp, weight_ih[: 2 * p].T, out=block.reset_update)
    torch.mm(x_Mp, weight_ih[2 * p :].T, out=block.new)
    if state_Mp is None:
        block.of_state.copy_(bias_hh[2 * p :])
    else:
        block.reset_update.addmm_(state_Mp, weight_hh[: 2 * p].T)
        torch.mm(state_Mp, weight_hh[2 * p :].T, out=block.of_state).add_(bias_hh[2 * p :])
    block.reset_update.add_(bias_ih[: 2 * p] + bias_hh[: 2 * p]).sigmoid_()
    block.new.add_(bias_ih[2 * p :]).addcmul_(block.reset, block.of_state).tanh_()


def _differentiate(block: _Gates, through_Mp: Tensor, grad_Mp: Tensor, state_Mp: Tensor | None, gates: _Gates) -> None:
    """Gradients before the gates' activations into `block`, and the former state's past all products."""
    torch.mul(grad_Mp, gates.update, out=through_Mp)
    torch.sub(grad_Mp, through_Mp, out=block.new)
    _aten.tanh_backward.grad_input(block.new, gates.new, grad_input=block.new)
    torch.mul(block.new, gates.reset, out=block.of_state)
    torch.mul(block.new, gates.of_state, out=block.reset)
    if state_Mp is None:
        torch.neg(gates.new, out=block.update)
    else:
        torch.sub(state_Mp, gates.new, out=block.update)
    block.update.mul_(grad_Mp)
    _aten.sigmoid_backward.grad_input(block.reset_update, gates.reset_update, grad_input=block.reset_update)


def _blocks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, num_rows))
