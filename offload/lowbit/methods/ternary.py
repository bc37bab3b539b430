"""Ternary weights: three values for each row, the middle one zero.

Shapes: R rows (outputs), C columns (inputs).
"""

from dataclasses import dataclass

import torch

from .compensation import spread_errors


@dataclass(frozen=True, eq=False)
class Ternary:
    """A matrix as signs and two numbers for each row, float32 as they are stored in bfloat16.

    Args:
        sign_RC: -1, 0 or 1.
        low_R: what -1 stands for.
        high_R: what 1 stands for.
    """

    sign_RC: torch.Tensor
    low_R: torch.Tensor
    high_R: torch.Tensor

    @property
    def weight_RC(self) -> torch.Tensor:
        """The matrix that it stands for."""
        low_RC, high_RC = self.low_R[:, None], self.high_R[:, None]
        return torch.where(self.sign_RC > 0, high_RC, torch.where(self.sign_RC < 0, low_RC, 0.0))


def ternary(w_RC: torch.Tensor, moment_CC: torch.Tensor | None = None) -> Ternary:
    """Round each weight to zero, or to what the weights beyond half of the row's smallest or largest are in the mean.

    The thresholds are QMoE's, so that most weights are zero. Its values are the smallest and the largest themselves.

    Source: QMoE (arXiv:2310.16795), section 3.2.

    Args:
        w_RC: float32.
        moment_CC: of the inputs, from `second_moment`: each column's error is spread over those that follow. None
            rounds each weight alone.
    """
    below_R, above_R = w_RC.amin(1).clamp_max(0) / 2, w_RC.amax(1).clamp_min(0) / 2
    low_R, high_R = _mean(w_RC, w_RC < below_R[:, None]), _mean(w_RC, w_RC > above_R[:, None])
    sign_CR = torch.zeros_like(w_RC.t(), memory_format=torch.contiguous_format)

    def nearest(column: int, left_R: torch.Tensor) -> torch.Tensor:
        sign_R = (left_R > above_R).float() - (left_R < below_R).float()
        sign_CR[column] = sign_R
        return torch.where(sign_R > 0, high_R, torch.where(sign_R < 0, low_R, 0.0))

    if moment_CC is None:
        sign_RC = (w_RC > above_R[:, None]).float() - (w_RC < below_R[:, None]).float()
    else:
        spread_errors(w_RC, moment_CC, nearest)
        sign_RC = sign_CR.t().contiguous()
    return Ternary(sign_RC, low_R, high_R)


def _mean(w_RC: torch.Tensor, is_meant_RC: torch.Tensor) -> torch.Tensor:
    """The mean of some weights of each row, as bfloat16 has it; 0 where there are none."""
    mean_R = (w_RC * is_meant_RC).sum(1) / is_meant_RC.sum(1).clamp_min(1)
    return mean_R.bfloat16().float()
