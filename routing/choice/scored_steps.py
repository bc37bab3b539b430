"""A projection, a GRU cell and scores of its states in one pass of C over blocks of tokens, without gradient.

Between torch's products of such narrow matrices the intermediate results go through memory. On processors other than
Intel's, MKL also leaves half of the vector units idle.

Shapes: T tokens, D model width, p state width, R routable experts.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from .gru import gru_cell
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
        return _by_c(kernels.expertier_scored_steps, x_TD, state_Tp, given)
    after_Tp = gru_cell(linear(x_TD, projection_pD), state_Tp, weights)
    return linear(after_Tp, score_Rp), after_Tp


def _suits_c(x_TD: Tensor, state_Tp: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Whether the C takes these rows: many, all in float32 on a CPU, and no gradient asked for."""
    if torch.is_grad_enabled() or len(x_TD) < FEWEST_ROWS:
        return False
    given = (x_TD, *([] if state_Tp is None else [state_Tp]), *weights)
    return all(tensor.dtype == torch.float32 for tensor in given) and has_plain_memory(*given)


def _by_c(
    kernel: Callable[..., int], x_TD: Tensor, state_Tp: Tensor | None, weights: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    (T, D), p, R = x_TD.shape, len(weights[0]), len(weights[-1])
    after_Tp, score_TR = x_TD.new_empty(T, p), x_TD.new_empty(T, R)
    given = [x_TD.contiguous(), *(weight.contiguous() for weight in weights)]
    state = None if state_Tp is None else state_Tp.contiguous()
    x, *addresses = (tensor.data_ptr() for tensor in given)
    before = 0 if state is None else state.data_ptr()
    if kernel(x, before, *addresses, after_Tp.data_ptr(), score_TR.data_ptr(), T, D, p, R):
        raise MemoryError(f"no memory for the states of {T} tokens")
    return score_TR, after_Tp
