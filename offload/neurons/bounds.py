"""Which units cannot be active, proven from a copy of the gate in eight bits.

Of a row g of the gate there are codes q and a scale s, so that g = s q + r, and of an input x likewise x = t p + u.
Then g x = s t (q p) + s q u + r x, where (q p) is a sum of integers, without error. So g x is at most

    s t (q p) + |s q| |u| + |r| |x|

by Cauchy's and Schwarz's inequality. Where that is not positive, the unit is not active, whatever is in its row. So the
choice errs to one side only: it holds every active unit, and some others. Nothing is trained.

LLM in a flash (Alizadeh et al. 2023, arXiv:2312.11514, section 3.1) trains a predictor of low rank here, which takes
less memory and misses some active units.

Shapes: T tokens, F hidden units, D model width.
"""

from dataclasses import dataclass
from typing import Self

import torch

LARGEST = 127
"""Of int8 codes, which are as large below zero as above."""
TINY = 1e-30
"""Least scale: rows of zeros have codes of zero, and nothing is divided by zero."""
ROUNDING = 2.0**-23
"""Of the model's own sum of D products in float32, per product; it may call a unit active that is zero by a hair."""


@dataclass(frozen=True, eq=False)
class GateBounds:
    """Of one gate, or of the gates of all experts of a layer below each other.

    Args:
        code_FD: int8.
        scale_F: float32.
        length_F: float32, |s q|.
        rest_F: float32, |r|.
    """

    code_FD: torch.Tensor
    scale_F: torch.Tensor
    length_F: torch.Tensor
    rest_F: torch.Tensor

    @classmethod
    def of(cls, gate_FD: torch.Tensor) -> Self:
        """From the gate itself."""
        exact_FD = gate_FD.float()
        code_FD, scale_F = _codes(exact_FD)
        approximate_FD = code_FD.float() * scale_F[:, None]
        rest_F = (exact_FD - approximate_FD).double().norm(dim=1).float() * (1 + 1e-6)
        return cls(code_FD, scale_F, approximate_FD.double().norm(dim=1).float() * (1 + 1e-6), rest_F)

    def split(self, num_units: int) -> list[Self]:
        """The same by so many units each: views, without memory of their own."""
        pieces = (each.split(num_units) for each in (self.code_FD, self.scale_F, self.length_F, self.rest_F))
        return [type(self)(*piece) for piece in zip(*pieces, strict=True)]

    def may_be_active(self, x_TD: torch.Tensor, bias_F: torch.Tensor | None) -> torch.Tensor:
        """[F] bool: units that some token may make active."""
        exact_TD = x_TD.float()
        code_TD, scale_T = _codes(exact_TD)
        # not public by its name only; integer sums are exact, so that any implementation gives these
        product_TF = torch._int_mm(code_TD, self.code_FD.t()).float() * scale_T[:, None] * self.scale_F
        left_T1 = (exact_TD - code_TD.float() * scale_T[:, None]).norm(dim=1, keepdim=True)
        length_T1 = exact_TD.norm(dim=1, keepdim=True)
        rounding = ROUNDING * x_TD.shape[1]
        margin_TF = left_T1 * self.length_F + length_T1 * (self.rest_F + rounding * (self.length_F + self.rest_F))
        most_TF = product_TF + margin_TF * (1 + 1e-5)
        if bias_F is not None:
            most_TF = most_TF + bias_F.float() + rounding * bias_F.float().abs()
        return (most_TF > 0).any(dim=0)


def _codes(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes and one scale for each row."""
    scale = rows.abs().amax(dim=1).clamp_min(TINY) / LARGEST
    return (rows / scale[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale
