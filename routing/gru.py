"""The GRU cell that routers share. On a CPU it runs in blocks of rows, whose gates are computed where they lie.

torch's own cell on a CPU gives every product, sum and gate of all rows new memory, which costs more than the products.

Shapes: T tokens, p state width; M rows of one block. Gates lie side by side as reset, update, the input's part of the
new state, and the former state's part of it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# so many rows of states and gates stay in the cache; a multiple of what the products compute at once
BLOCK_ROWS = 1024
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
        T, p = x_Tp.shape
        keeps = any(ctx.needs_input_grad)
        gates = x_Tp.new_empty(T if keeps else min(T, BLOCK_ROWS), 4 * p)
        bias = torch.cat([bias_ih[: 2 * p] + bias_hh[: 2 * p], bias_ih[2 * p :], bias_hh[2 * p :]])
        after_Tp = torch.empty_like(x_Tp)
        for rows in _blocks(T):
            block = gates[rows] if keeps else gates[: rows.stop - rows.start]
            before_Mp = None if state_Tp is None else state_Tp[rows]
            _gates_into(block, x_Tp[rows], before_Mp, weight_ih, weight_hh, bias)
            _, update_Mp, new_Mp, _ = block.split(p, dim=1)
            if before_Mp is None:
                torch.addcmul(new_Mp, update_Mp, new_Mp, value=-1, out=after_Tp[rows])
            else:
                torch.lerp(new_Mp, before_Mp, update_Mp, out=after_Tp[rows])
        if keeps:
            ctx.save_for_backward(x_Tp, state_Tp, weight_ih, weight_hh, gates)
        return after_Tp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_Tp: Tensor) -> tuple[Tensor | None, ...]:
        x_Tp, state_Tp, weight_ih, weight_hh, gates = ctx.saved_tensors
        T, p = x_Tp.shape
        grad_x, grad_state = torch.empty_like(x_Tp), torch.empty_like(x_Tp)
        grad_ih, grad_hh = torch.zeros_like(weight_ih), torch.zeros_like(weight_hh)
        grad_bias = weight_ih.new_zeros(4 * p)
        grad_gates = gates.new_empty(min(T, BLOCK_ROWS), 4 * p)
        with torch.autocast("cpu", enabled=False):
            for rows in _blocks(T):
                block = grad_gates[: rows.stop - rows.start]
                before_Mp = None if state_Tp is None else state_Tp[rows]
                _gate_gradients_into(block, grad_state[rows], grad_Tp[rows], before_Mp, gates[rows])
                of_reset_update, of_input, of_state = block[:, : 2 * p], block[:, : 3 * p], block[:, 3 * p :]
                grad_bias += block.sum(dim=0)
                grad_ih.addmm_(of_input.T, x_Tp[rows])
                torch.mm(of_input, weight_ih, out=grad_x[rows])
                if before_Mp is not None:
                    grad_hh[: 2 * p].addmm_(of_reset_update.T, before_Mp)
                    grad_hh[2 * p :].addmm_(of_state.T, before_Mp)
                    grad_state[rows].addmm_(of_reset_update, weight_hh[: 2 * p])
                    grad_state[rows].addmm_(of_state, weight_hh[2 * p :])
        grad_bias_hh = torch.cat([grad_bias[: 2 * p], grad_bias[3 * p :]])
        return grad_x, None if state_Tp is None else grad_state, grad_ih, grad_hh, grad_bias[: 3 * p], grad_bias_hh


def _blocks(num_rows: int) -> Iterator[slice]:
    for start in range(0, num_rows, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, num_rows))


def _gates_into(
    block: Tensor, x_Mp: Tensor, state_Mp: Tensor | None, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor
) -> None:
    """Reset, update, new state and the former state's part of the latter, of one block [M, 4p]."""
    p = x_Mp.shape[1]
    reset_update, of_state = block[:, : 2 * p], block[:, 3 * p :]
    torch.mm(x_Mp, weight_ih.T, out=block[:, : 3 * p])
    if state_Mp is None:
        of_state.zero_()
    else:
        reset_update.addmm_(state_Mp, weight_hh[: 2 * p].T)
        torch.mm(state_Mp, weight_hh[2 * p :].T, out=of_state)
    block += bias
    reset_update.sigmoid_()
    block[:, 2 * p : 3 * p].addcmul_(block[:, :p], of_state).tanh_()


def _gate_gradients_into(
    block: Tensor, through_Mp: Tensor, grad_Mp: Tensor, state_Mp: Tensor | None, gates: Tensor
) -> None:
    """Gradients before the gates' activations [M, 4p], and the former state's gradient past all products."""
    reset_Mp, update_Mp, new_Mp, of_state_Mp = gates.chunk(4, dim=1)
    grad_reset, grad_update, grad_new, grad_of_state = block.chunk(4, dim=1)
    torch.mul(grad_Mp, update_Mp, out=through_Mp)
    torch.sub(grad_Mp, through_Mp, out=grad_new)
    _aten.tanh_backward.grad_input(grad_new, new_Mp, grad_input=grad_new)
    torch.mul(grad_new, reset_Mp, out=grad_of_state)
    torch.mul(grad_new, of_state_Mp, out=grad_reset)
    _aten.sigmoid_backward.grad_input(grad_reset, reset_Mp, grad_input=grad_reset)
    if state_Mp is None:
        torch.neg(new_Mp, out=grad_update)
    else:
        torch.sub(state_Mp, new_Mp, out=grad_update)
    grad_update.mul_(grad_Mp)
    _aten.sigmoid_backward.grad_input(grad_update, update_Mp, grad_input=grad_update)
