"""Methods that look at the inputs too: GPTQ, which lets later columns make up for earlier ones, and AWQ's scales.

Shapes: R rows (outputs), C columns (inputs), N rows of inputs.
"""

from collections.abc import Callable

import torch

from ...codes.schemes import Scheme
from .rounding import Rounded, least_squares

DAMPING = 0.01
"""Share of the mean of the diagonal that is added to it, as in GPTQ."""
BLOCK_COLUMNS = 128
"""Columns whose corrections are applied at once, as in GPTQ; results do not depend on it but for rounding."""
ALPHAS = tuple(step / 10 for step in range(11))
"""Exponents that AWQ tries."""


def second_moment(x_NC: torch.Tensor, weight_N: torch.Tensor) -> torch.Tensor:
    """Sum of `weight * x x^T`, `[C, C]` float32."""
    return (x_NC * weight_N[:, None]).T @ x_NC


def gptq(w_RC: torch.Tensor, scheme: Scheme, dtype: str, moment_CC: torch.Tensor) -> Rounded:
    """Round one column after the other, and spread each error over the columns that are left.

    Columns come in the order of their mean square, the largest first. Scales are chosen beforehand (static groups), so
    that groups stay neighbours and no order has to be stored.

    Source: GPTQ (arXiv:2210.17323), algorithm 1.

    Args:
        moment_CC: of the inputs, from `second_moment`.
    """
    diagonal_C = moment_CC.diagonal()
    chosen = least_squares(w_RC, scheme, dtype, diagonal_C)
    scale_CR = chosen.scale_RG.t().repeat_interleave(scheme.group or w_RC.shape[1], dim=0)
    number_CR = torch.empty_like(scale_CR)

    def nearest(column: int, left_R: torch.Tensor) -> torch.Tensor:
        number_CR[column] = scheme.numbers(left_R, scale_CR[column])
        return number_CR[column] * scale_CR[column]

    spread_errors(w_RC, moment_CC, nearest)
    return Rounded(scheme, number_CR.t().contiguous(), chosen.scale_RG, dtype)


def spread_errors(
    w_RC: torch.Tensor, moment_CC: torch.Tensor, nearest: Callable[[int, torch.Tensor], torch.Tensor]
) -> None:
    """Round one column after the other, those with the largest inputs first, and let the others make up for each error.

    Args:
        w_RC: float32.
        moment_CC: of the inputs, from `second_moment`.
        nearest: told a column and what its weights have become, gives the weights that they are rounded to, `[R]`.
    """
    order_C = torch.argsort(moment_CC.diagonal(), descending=True, stable=True)
    factor_CC = _inverse_factor(moment_CC[order_C][:, order_C])
    # columns lie in a row, because one after the other is read and written
    left_CR, number_C = w_RC.t()[order_C].contiguous(), order_C.tolist()
    for begin in range(0, len(left_CR), BLOCK_COLUMNS):
        end = min(begin + BLOCK_COLUMNS, len(left_CR))
        error_XR = torch.empty_like(left_CR[begin:end])
        for column in range(begin, end):
            left_R = left_CR[column]
            error_R = (left_R - nearest(number_C[column], left_R)) / factor_CC[column, column]
            left_CR[column:end] -= factor_CC[column, column:end, None] * error_R
            error_XR[column - begin] = error_R
        left_CR[end:] -= factor_CC[begin:end, end:].t() @ error_XR


def _inverse_factor(moment_CC: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of the damped moment's inverse; damped more where rounding makes it indefinite."""
    damping = DAMPING * float(moment_CC.diagonal().mean()) or 1.0
    for _ in range(6):
        damped_CC = moment_CC + damping * torch.eye(len(moment_CC))
        lower_CC, failed = torch.linalg.cholesky_ex(damped_CC)
        if not int(failed):
            upper_CC, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_CC), upper=True)
            if not int(failed):
                return upper_CC
        damping *= 10
    raise ArithmeticError("the inputs of this expert are not finite")


def balancing_scales(
    w_RC: torch.Tensor, scheme: Scheme, dtype: str, moment_CC: torch.Tensor, size_C: torch.Tensor
) -> torch.Tensor:
    """AWQ's factors for the columns of a matrix, whose inputs are divided by them: the best of size^alpha.

    Source: AWQ (arXiv:2306.00978), section 3.2.

    Args:
        size_C: mean absolute value of each input.

    Returns:
        `[C]`; its geometric mean over the extremes is 1.
    """
    best_C, least = torch.ones_like(size_C), torch.inf
    for alpha in ALPHAS:
        factor_C = size_C.clamp_min(1e-4 * float(size_C.max()) + 1e-12).pow(alpha)
        factor_C = factor_C / (factor_C.max() * factor_C.min()).sqrt()
        diagonal_C = moment_CC.diagonal() / factor_C.square()
        rounded = least_squares(w_RC * factor_C, scheme, dtype, diagonal_C)
        error_RC = rounded.weight_RC / factor_C - w_RC
        error = float((error_RC @ moment_CC * error_RC).sum())
        if error < least:
            best_C, least = factor_C, error
    return best_C
