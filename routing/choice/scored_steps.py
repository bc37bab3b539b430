"""A projection, a GRU cell and scores of its states in one pass of C over blocks of tokens.

Between torch's products of such narrow matrices the intermediate results go through memory. On processors other than
Intel's, MKL also leaves half of the vector units idle.

Shapes: T tokens, D model width, p state width, R routable experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .gru import Gates, cell_gradients, gru_cell
from .library import routing_kernels
from .plain_tensors import has_plain_memory

# Below this many rows, rearranging the weights for the C takes longer than the products.
FEWEST_ROWS = 128


def scored_steps(
    x_TD: Tensor, state_Tp: Tensor | None, projection_pD: Tensor, weights: Sequence[Tensor], score_Rp: Tensor
) -> tuple[Tensor, Tensor]:
    """`gru_cell` of the projected inputs, and scores of its states.

    Args:
        x_TD: hidden states.
        state_Tp: the old state; None is zero.
        projection_pD: maps hidden states to inputs of the cell.
        weights: the four tensors that `gru_cell` takes.
        score_Rp: maps states to scores.

    Returns:
        The scores [T, R] and the new state [T, p].

    Raises:
        ValueError: if inputs are not as wide as the projection, or the old state has another shape or dtype.
    """
    if x_TD.shape[1] != projection_pD.shape[1]:
        raise ValueError(f"inputs must be [T, {projection_pD.shape[1]}]; got {list(x_TD.shape)}")
    wanted = (len(x_TD), len(projection_pD))
    if state_Tp is not None and (state_Tp.shape, state_Tp.dtype) != (wanted, x_TD.dtype):
        raise ValueError(
            f"the state before must be {x_TD.dtype} {wanted}; got {state_Tp.dtype} {tuple(state_Tp.shape)}"
        )
    given = (projection_pD, *weights, score_Rp)
    if _suits_c(x_TD, state_Tp, given) and (kernels := routing_kernels()) is not None:
        kernel = kernels.expertier_scored_steps
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _there(x_TD, state_Tp, *given)):
            return _LearningSteps.apply(kernel, x_TD, state_Tp, *given)
        return _by_c(kernel, x_TD, state_Tp, given)
    after_Tp = gru_cell(linear(x_TD, projection_pD), state_Tp, weights)
    return linear(after_Tp, score_Rp), after_Tp


def _suits_c(x_TD: Tensor, state_Tp: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Whether the C takes these rows: many, and all in float32 on a CPU."""
    if len(x_TD) < FEWEST_ROWS:
        return False
    given = _there(x_TD, state_Tp, *weights)
    return all(tensor.dtype == torch.float32 for tensor in given) and has_plain_memory(*given)


def _there(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


class _LearningSteps(torch.autograd.Function):
    """The forward pass by C, which keeps the gates; the backward pass by torch's products, block by block."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Callable[..., int],
        x_TD: Tensor,
        state_Tp: Tensor | None,
        projection_pD: Tensor,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor,
        bias_hh: Tensor,
        score_Rp: Tensor,
    ) -> tuple[Tensor, Tensor]:
        projected_Tp = x_TD.new_empty(len(x_TD), len(projection_pD))
        gates = Gates.empty(projected_Tp, len(x_TD))
        given = (projection_pD, weight_ih, weight_hh, bias_ih, bias_hh, score_Rp)
        score_TR, after_Tp = _by_c(kernel, x_TD, state_Tp, given, (projected_Tp, gates.of_state, gates.all))
        ctx.save_for_backward(
            x_TD, state_Tp, projection_pD, weight_ih, weight_hh, score_Rp, after_Tp, projected_Tp, *gates
        )
        return score_TR, after_Tp

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TR: Tensor, grad_Tp: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, state_Tp, projection_pD, weight_ih, weight_hh, score_Rp, after_Tp, projected_Tp, *gates = (
            ctx.saved_tensors
        )
        whole_Tp = torch.addmm(grad_Tp, grad_TR, score_Rp)
        grad_projected_Tp, grad_state_Tp, *of_cell = cell_gradients(
            whole_Tp, projected_Tp, state_Tp, (weight_ih, weight_hh), Gates(*gates)
        )
        assert grad_projected_Tp is not None
        return (
            None,
            grad_projected_Tp @ projection_pD,
            grad_state_Tp,
            grad_projected_Tp.T @ x_TD,
            *of_cell,
            grad_TR.T @ after_Tp,
        )


def _by_c(
    kernel: Callable[..., int],
    x_TD: Tensor,
    state_Tp: Tensor | None,
    weights: Sequence[Tensor],
    kept: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Scores and states; `kept` receives projected inputs, the old state's part of the candidate, and the gates."""
    (T, D), p, R = x_TD.shape, len(weights[0]), len(weights[-1])
    after_Tp, score_TR = x_TD.new_empty(T, p), x_TD.new_empty(T, R)
    given = [x_TD.contiguous(), *(weight.contiguous() for weight in weights)]
    state = None if state_Tp is None else state_Tp.contiguous()
    x, *addresses = (tensor.data_ptr() for tensor in given)
    before = 0 if state is None else state.data_ptr()
    into = [tensor.data_ptr() for tensor in kept] or [0, 0, 0]
    if kernel(x, before, *addresses, after_Tp.data_ptr(), score_TR.data_ptr(), *into, T, D, p, R):
        raise MemoryError(f"no memory for the states of {T} tokens")
    return score_TR, after_Tp
