"""The GRU cell that routers share. On a CPU it runs in blocks of rows and computes the gates in place.

torch's own cell on a CPU allocates new memory for every product, sum and gate, which costs more than the products.

Shapes: T tokens, p state width; M rows of one block.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .plain_tensors import is_transformed

# The fastest of the sizes tried on two cores with 2 MiB of cache each. Larger blocks leave the cache; in smaller ones
# threads wait for each other.
BLOCK_ROWS = 2048
# Below this many rows torch's own cell is faster, because splitting into blocks costs more than it saves.
FEWEST_ROWS = 128
_aten = torch.ops.aten


def gru_cell(x_Tp: Tensor, state_Tp: Tensor | None, weights: Sequence[Tensor]) -> Tensor:
    """The state after one step.

    Args:
        x_Tp: one input per row.
        state_Tp: the old state; None is zero.
        weights: `weight_ih` [3p, p], `weight_hh` [3p, p], `bias_ih` [3p] and `bias_hh` [3p] of `torch.nn.GRUCell`.

    Returns:
        [T, p].

    Source: Cho et al. 2014, arXiv:1406.1078, eqs. 5-8, with the gate order and biases of `torch.nn.GRUCell`.
    """
    is_large = x_Tp.device.type == "cpu" and len(x_Tp) >= FEWEST_ROWS and not torch.compiler.is_compiling()
    given = (x_Tp, *([] if state_Tp is None else [state_Tp]), *weights)
    if is_large and not is_transformed(*given):
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
        gates = Gates.empty(x_Tp, T if keeps else min(T, BLOCK_ROWS))
        weights = (weight_ih, weight_hh, bias_ih, bias_hh)
        after_Tp = torch.empty_like(x_Tp)
        for rows in _blocks(T):
            block = gates.rows(rows if keeps else slice(0, rows.stop - rows.start))
            _step(block, x_Tp[rows], None if state_Tp is None else state_Tp[rows], weights, after_Tp[rows])
        if keeps:
            ctx.save_for_backward(x_Tp, state_Tp, weight_ih, weight_hh, *gates)
        return after_Tp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_Tp: Tensor) -> tuple[Tensor | None, ...]:
        x_Tp, state_Tp, weight_ih, weight_hh, *saved = ctx.saved_tensors
        return cell_gradients(grad_Tp, x_Tp, state_Tp, (weight_ih, weight_hh), Gates(*saved))


def cell_gradients(
    grad_Tp: Tensor, x_Tp: Tensor, state_Tp: Tensor | None, weights: Sequence[Tensor], gates: "Gates"
) -> tuple[Tensor | None, ...]:
    """Gradients of a step's input, old state (None without one), two weights and two biases, block by block.

    Args:
        grad_Tp: gradient of the new state.
        x_Tp: the input of the step.
        state_Tp: the old state; None is zero.
        weights: `weight_ih` and `weight_hh`.
        gates: what the step computed on its way, for all rows.
    """
    weight_ih, weight_hh = weights
    T, p = x_Tp.shape
    grad_x, grad_state = torch.empty_like(x_Tp), torch.empty_like(x_Tp)
    grad_ih, grad_hh = torch.zeros_like(weight_ih), torch.zeros_like(weight_hh)
    grad_bias_ih, grad_bias_hh = weight_ih.new_zeros(3 * p), weight_hh.new_zeros(3 * p)
    workspace = Gates.empty(x_Tp, min(T, BLOCK_ROWS))
    with torch.autocast("cpu", enabled=False):
        for rows in _blocks(T):
            block = workspace.rows(slice(0, rows.stop - rows.start))
            before_Mp = None if state_Tp is None else state_Tp[rows]
            _differentiate(block, grad_state[rows], grad_Tp[rows], before_Mp, gates.rows(rows))
            bias_3p = block.all.sum(dim=0)
            grad_bias_ih += bias_3p
            grad_bias_hh += torch.cat([bias_3p[: 2 * p], block.of_state.sum(dim=0)])
            grad_ih.addmm_(block.all.T, x_Tp[rows])
            torch.mm(block.all, weight_ih, out=grad_x[rows])
            if before_Mp is not None:
                grad_hh[: 2 * p].addmm_(block.reset_update.T, before_Mp)
                grad_hh[2 * p :].addmm_(block.of_state.T, before_Mp)
                grad_state[rows].addmm_(block.reset_update, weight_hh[: 2 * p])
                grad_state[rows].addmm_(block.of_state, weight_hh[2 * p :])
    return grad_x, None if state_Tp is None else grad_state, grad_ih, grad_hh, grad_bias_ih, grad_bias_hh


class Gates(NamedTuple):
    """Gates of some rows.

    Args:
        all: reset gate, update gate and candidate state side by side, [M, 3p].
        of_state: the contribution of the old state to the candidate state, before the reset gate, [M, p].
    """

    all: Tensor
    of_state: Tensor

    @classmethod
    def empty(cls, like_Tp: Tensor, num_rows: int) -> Self:
        """Uninitialised memory for `num_rows` rows."""
        p = like_Tp.shape[1]
        return cls(like_Tp.new_empty(num_rows, 3 * p), like_Tp.new_empty(num_rows, p))

    def rows(self, rows: slice) -> Self:
        """The gates of a slice of the rows."""
        return type(self)(self.all[rows], self.of_state[rows])

    @property
    def reset_update(self) -> Tensor:
        return self.all[:, : 2 * self.of_state.shape[1]]

    @property
    def reset(self) -> Tensor:
        return self.all[:, : self.of_state.shape[1]]

    @property
    def update(self) -> Tensor:
        p = self.of_state.shape[1]
        return self.all[:, p : 2 * p]

    @property
    def new(self) -> Tensor:
        return self.all[:, 2 * self.of_state.shape[1] :]


def _step(block: Gates, x_Mp: Tensor, state_Mp: Tensor | None, weights: Sequence[Tensor], after_Mp: Tensor) -> None:
    """Compute the gates and the new state of one block, in place."""
    weight_ih, weight_hh, bias_ih, bias_hh = weights
    p = x_Mp.shape[1]
    torch.addmm(torch.cat([bias_ih[: 2 * p] + bias_hh[: 2 * p], bias_ih[2 * p :]]), x_Mp, weight_ih.T, out=block.all)
    if state_Mp is None:
        block.of_state.copy_(bias_hh[2 * p :])
    else:
        block.reset_update.addmm_(state_Mp, weight_hh[: 2 * p].T)
        torch.addmm(bias_hh[2 * p :], state_Mp, weight_hh[2 * p :].T, out=block.of_state)
    block.reset_update.sigmoid_()
    block.new.addcmul_(block.reset, block.of_state).tanh_()
    if state_Mp is None:
        torch.addcmul(block.new, block.update, block.new, value=-1, out=after_Mp)
    else:
        torch.lerp(block.new, state_Mp, block.update, out=after_Mp)


def _differentiate(block: Gates, through_Mp: Tensor, grad_Mp: Tensor, state_Mp: Tensor | None, gates: Gates) -> None:
    """Write the pre-activation gradients of the gates to `block`, and what reaches the old state directly to `through`.

    The matrix products that lead further back are left to the caller.
    """
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
