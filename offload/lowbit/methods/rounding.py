"""Methods that look at the weights alone: the nearest codes, and zeros fitted by half-quadratic splitting.

Shapes: R rows (outputs), C columns (inputs), G groups of columns; X columns of one group.
"""

from dataclasses import dataclass

import torch

from ...codes.decode import SCALE_DTYPES
from ...codes.schemes import Scheme
from ...codes.stored_matrix import StoredMatrix

SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Scales that a fit begins with, as shares of the one that reaches the farthest weight: errors have several minima."""
EXPONENT, STEPS, FIRST_BETA, BETA_GROWTH = 0.7, 20, 10.0, 1.01
"""p, iterations, beta and its growth: the defaults of HQQ."""
CACHED_WEIGHTS = 1 << 16
"""Weights that HQQ fits at a time: its handful of arrays then stay in the second cache over all iterations."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """A matrix as codes and scales.

    Args:
        scheme: what it is rounded to.
        number_RC: values of the codes, float32.
        scale_RG: float32.
        dtype: of the stored scales, as safetensors names it.
        zero_RG: in the units of the codes' values; None where the scheme has no zeros.
    """

    scheme: Scheme
    number_RC: torch.Tensor
    scale_RG: torch.Tensor
    dtype: str
    zero_RG: torch.Tensor | None = None

    @property
    def weight_RC(self) -> torch.Tensor:
        """The matrix that it stands for, before it is rounded to the model's dtype."""
        number_RGX = self.scheme.grouped(self.number_RC)
        if self.zero_RG is not None:
            number_RGX = number_RGX - self.zero_RG[..., None]
        grouped = number_RGX * self.scale_RG[..., None]
        return grouped.view_as(self.number_RC)

    @property
    def stored(self) -> StoredMatrix:
        """As it goes into a file."""
        return self.scheme.stored(self.number_RC, self.scale_RG, self.dtype, self.zero_RG)


def with_scale(w_RC: torch.Tensor, scheme: Scheme, scale_RG: torch.Tensor, dtype: str) -> Rounded:
    """The nearest codes to given scales."""
    number_RGX = scheme.numbers(scheme.grouped(w_RC), scale_RG[..., None])
    return Rounded(scheme, number_RGX.view_as(w_RC), scale_RG, dtype)


def rtn(w_RC: torch.Tensor, scheme: Scheme, dtype: str) -> Rounded:
    """Round to nearest: the scale reaches the weight farthest from zero, and each weight gets the nearest code."""
    return with_scale(w_RC, scheme, scheme.scale_of(scheme.grouped(w_RC), dtype), dtype)


def hqq(w_RC: torch.Tensor, scheme: Scheme, dtype: str) -> Rounded:
    """Fit zeros so that the sum of |error|^0.7 is least; scales reach from the least to the largest weight.

    Half-quadratic splitting: errors that are large become a term of their own, and the zero is fitted to the rest.

    Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models (2023).

    Raises:
        ValueError: if the scheme has no zeros.
    """
    if not scheme.has_zero:
        raise ValueError(f"hqq fits zeros, which {scheme.name} has not")
    some = max(1, CACHED_WEIGHTS // w_RC.shape[1])
    fitted = [_hqq_rows(rows_RC, scheme, dtype) for rows_RC in w_RC.split(some)]
    number_RC, scale_RG, zero_RG = (torch.cat(parts) for parts in zip(*fitted, strict=True))
    return Rounded(scheme, number_RC, scale_RG, dtype, zero_RG)


def _hqq_rows(w_RC: torch.Tensor, scheme: Scheme, dtype: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values of codes, scales and zeros of some rows; fitting stops when their mean error rises."""
    w_RGX = scheme.grouped(w_RC)
    least_RG, largest_RG = w_RGX.amin(-1), w_RGX.amax(-1)
    scale_RG = scheme.rounded_scale((largest_RG - least_RG) / (2 * scheme.most - 1), dtype)
    x_RGX = w_RGX / scale_RG[..., None]
    first_RG = -scheme.most - x_RGX.amin(-1)
    best_RG, fewest_RG = first_RG, torch.full_like(first_RG, torch.inf)
    for zero_RG in (first_RG, _half_quadratic(x_RGX, first_RG, scheme)):
        kept_RG = _as_stored(zero_RG, scheme, dtype)
        error_RG = _steps_off(x_RGX, kept_RG, scheme).abs_().pow_(EXPONENT).sum(-1)
        best_RG = torch.where(error_RG < fewest_RG, kept_RG, best_RG)
        fewest_RG = torch.minimum(error_RG, fewest_RG)
    number_RGX = scheme.numbers(w_RGX, scale_RG[..., None], best_RG[..., None])
    return number_RGX.view_as(w_RC), scale_RG, best_RG


def _as_stored(zero_RG: torch.Tensor, scheme: Scheme, dtype: str) -> torch.Tensor:
    """Zeros as they are read back."""
    if scheme.rounds_zero:
        return zero_RG.round().clamp(-scheme.most, scheme.most - 1)
    return zero_RG.to(SCALE_DTYPES[dtype]).float()


def _steps_off(x_RGX: torch.Tensor, zero_RG: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Errors of weights that are measured in steps of the scale."""
    zero_RG1 = zero_RG[..., None]
    return x_RGX - ((x_RGX + zero_RG1).round().clamp_(-scheme.most, scheme.most - 1) - zero_RG1)


def least_squares(w_RC: torch.Tensor, scheme: Scheme, dtype: str, weight_C: torch.Tensor) -> Rounded:
    """Choose scales by the sum of squared errors, each column weighted; floats keep the scales of `rtn`.

    This is the search for a range that AWQ and GPTQ offer, over SHRINKS.

    Args:
        weight_C: how much the error of a column costs: the mean square of its input.
    """
    w_RGX = scheme.grouped(w_RC)
    first_RG = scheme.scale_of(w_RGX, dtype)
    if not scheme.is_integer:
        return with_scale(w_RC, scheme, first_RG, dtype)
    weight_GX = weight_C.view(w_RGX.shape[1:])
    best_RG, least_RG = first_RG, torch.full_like(first_RG, torch.inf)
    for shrink in SHRINKS:
        scale_RG = scheme.rounded_scale(shrink * first_RG, dtype)
        number_RGX = scheme.numbers(w_RGX, scale_RG[..., None])
        top, bottom = ((weight_GX * number_RGX * x).sum(-1) for x in (w_RGX, number_RGX))
        fitted_RG = scheme.rounded_scale(torch.where(bottom > 0, top / bottom, scale_RG), dtype)
        for rounded_RG in (scale_RG, fitted_RG):
            error_RG = (weight_GX * _residual(w_RGX, rounded_RG, scheme).square_()).sum(-1)
            best_RG = torch.where(error_RG < least_RG, rounded_RG, best_RG)
            least_RG = torch.minimum(error_RG, least_RG)
    return with_scale(w_RC, scheme, best_RG, dtype)


def _residual(w_RGX: torch.Tensor, scale_RG: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return w_RGX - scheme.numbers(w_RGX, scale_RG[..., None]) * scale_RG[..., None]


def _half_quadratic(x_RGX: torch.Tensor, zero_RG: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The fitted zeros of weights in steps of the scale, in which beta suits weights of any size."""
    beta, before = FIRST_BETA, torch.inf
    for _ in range(STEPS):
        error_RGX = _steps_off(x_RGX, zero_RG, scheme)
        now = float(error_RGX.abs().mean())
        if now >= before:
            break
        before = now
        size_RGX = error_RGX.abs()
        apart_RGX = torch.sign(error_RGX) * (size_RGX - size_RGX.clamp_min(1e-8).pow(EXPONENT - 1) / beta).clamp_min(0)
        number_RGX = x_RGX - error_RGX + zero_RG[..., None]
        zero_RG = (number_RGX - (x_RGX - apart_RGX)).mean(-1)
        beta *= BETA_GROWTH
    return zero_RG
