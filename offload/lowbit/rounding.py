"""Methods that look at the weights alone: the nearest codes, and scales fitted by half-quadratic splitting.

Shapes: R rows (outputs), C columns (inputs), G groups of columns; X columns of one group.
"""

from dataclasses import dataclass

import torch

from ..codes.schemes import Scheme
from ..codes.stored_matrix import StoredMatrix

SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Scales that a fit begins with, as shares of the one that reaches the farthest weight: errors have several minima."""
EXPONENT, STEPS, FIRST_BETA, BETA_GROWTH = 0.7, 20, 10.0, 1.01
"""p, iterations, beta and its growth: the defaults of HQQ."""


@dataclass(frozen=True, eq=False)
class Rounded:
    """A matrix as codes and scales.

    Args:
        scheme: what it is rounded to.
        number_RC: values of the codes, float32.
        scale_RG: float32.
        dtype: of the stored scales, as safetensors names it.
    """

    scheme: Scheme
    number_RC: torch.Tensor
    scale_RG: torch.Tensor
    dtype: str

    @property
    def weight_RC(self) -> torch.Tensor:
        """The matrix that it stands for, before it is rounded to the model's dtype."""
        grouped = self.scheme.grouped(self.number_RC) * self.scale_RG[..., None]
        return grouped.view_as(self.number_RC)

    @property
    def stored(self) -> StoredMatrix:
        """As it goes into a file."""
        return self.scheme.stored(self.number_RC, self.scale_RG, self.dtype)


def with_scale(w_RC: torch.Tensor, scheme: Scheme, scale_RG: torch.Tensor, dtype: str) -> Rounded:
    """The nearest codes to given scales."""
    number_RGX = scheme.numbers(scheme.grouped(w_RC), scale_RG[..., None])
    return Rounded(scheme, number_RGX.view_as(w_RC), scale_RG, dtype)


def rtn(w_RC: torch.Tensor, scheme: Scheme, dtype: str) -> Rounded:
    """Round to nearest: the scale reaches the weight farthest from zero, and each weight gets the nearest code."""
    return with_scale(w_RC, scheme, scheme.scale_of(scheme.grouped(w_RC), dtype), dtype)


def hqq(w_RC: torch.Tensor, scheme: Scheme, dtype: str) -> Rounded:
    """Fit scales so that the sum of |error|^0.7 is least, which cares little for a few weights far out.

    Half-quadratic splitting: errors that are large become a term of their own, and the scale is fitted to the rest.
    HQQ fits the zero; here codes are symmetric, and the scale is fitted in its place.

    Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models (2023).

    Raises:
        ValueError: if the codes are floats, whose scales are exponents or reach the farthest weight.
    """
    if not scheme.is_integer:
        raise ValueError(f"hqq fits scales of integers; {scheme.form} is rounded by rtn or gptq")
    w_RGX = scheme.grouped(w_RC)
    first_RG = scheme.scale_of(w_RGX, dtype)
    best_RG, least_RG = first_RG, torch.full_like(first_RG, torch.inf)
    for shrink in SHRINKS:
        scale_RG = _half_quadratic(w_RGX, shrink * first_RG, scheme)
        for rounded_RG in (scheme.rounded_scale(scale_RG, dtype), scheme.rounded_scale(shrink * first_RG, dtype)):
            error_RG = _residual(w_RGX, rounded_RG, scheme).abs_().pow_(EXPONENT).sum(-1)
            best_RG = torch.where(error_RG < least_RG, rounded_RG, best_RG)
            least_RG = torch.minimum(error_RG, least_RG)
    return with_scale(w_RC, scheme, best_RG, dtype)


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


def _half_quadratic(w_RGX: torch.Tensor, scale_RG: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The fitted scales. Errors are measured in steps of the first scale, so that beta suits weights of any size."""
    unit_RG1 = torch.where(scale_RG == 0, torch.ones_like(scale_RG), scale_RG)[..., None]
    x_RGX, fitted_RG1 = w_RGX / unit_RG1, torch.ones_like(unit_RG1)
    beta, before = FIRST_BETA, torch.inf
    for _ in range(STEPS):
        number_RGX = scheme.numbers(x_RGX, fitted_RG1)
        error_RGX = x_RGX - number_RGX * fitted_RG1
        now = float(error_RGX.abs().mean())
        if now >= before:
            break
        before = now
        size_RGX = error_RGX.abs()
        apart_RGX = torch.sign(error_RGX) * (size_RGX - size_RGX.clamp_min(1e-8).pow(EXPONENT - 1) / beta).clamp_min(0)
        bottom_RG1 = number_RGX.square().sum(-1, keepdim=True)
        top_RG1 = ((x_RGX - apart_RGX) * number_RGX).sum(-1, keepdim=True)
        fitted_RG1 = torch.where(bottom_RG1 > 0, top_RG1 / bottom_RG1, fitted_RG1)
        beta *= BETA_GROWTH
    return (fitted_RG1 * unit_RG1).squeeze(-1)
