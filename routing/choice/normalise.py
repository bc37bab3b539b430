"""Scores divided by their sum, where that sum may underflow; softmaxes over the few slots of a token.

Shapes: T tokens, K slots or experts that are summed over.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# The gradient of a / sum grows like 1 / sum: 2^64 leaves float32 (2^127) room for the rest of the chain. Above this sum
# the quotient is taken as it is, below it logarithms are.
LEAST_SUM = 2.0**-64
TINY = torch.finfo(torch.float32).tiny


def normalised(score_TK: Tensor, by_logarithms: Callable[[], Tensor]) -> Tensor:
    """`score / sum(score)` over the last axis, also where all scores of a row are so small that they vanish.

    Args:
        score_TK: not negative.
        by_logarithms: the same quotient computed from the logarithms of the scores; taken in rows whose sum is below
            `LEAST_SUM`.
    """
    sum_T1 = score_TK.sum(dim=-1, keepdim=True)
    is_small_T1 = sum_T1 < LEAST_SUM
    # only a CPU can be asked without waiting for a device
    if sum_T1.device.type == "cpu" and not torch.compiler.is_compiling() and not is_small_T1.any():
        return score_TK / sum_T1
    return torch.where(is_small_T1, by_logarithms(), score_TK / sum_T1.masked_fill(is_small_T1, 1.0))


def as_shares(weight_TK: Tensor) -> Tensor:
    """Weights divided by their sum; all 0 where none is left. Rows whose sum is below `LEAST_SUM` pass no gradient."""
    sum_T1 = weight_TK.sum(dim=-1, keepdim=True)
    share_TK = weight_TK / sum_T1.clamp_min(TINY)
    return torch.where(sum_T1 < LEAST_SUM, share_TK.detach(), share_TK)


def softmax(logit_TK: Tensor) -> Tensor:
    """Softmax over the slots; on a CPU along columns, because torch has no vectors for rows as short as these."""
    if logit_TK.device.type != "cpu":
        return logit_TK.softmax(dim=-1)
    return logit_TK.T.contiguous().softmax(dim=0).T.contiguous()


def masked_softmax(logit_TK: Tensor, counts_TK: Tensor) -> Tensor:
    """Softmax over the slots that count; 0 elsewhere and in rows where none counts. Other slots get no gradient.

    A logit of -inf does not count: its expert was forbidden by the call's bias.
    """
    counts_TK = counts_TK & (logit_TK > -torch.inf)
    any_T1 = counts_TK.any(dim=-1, keepdim=True)
    masked_TK = logit_TK.masked_fill(~counts_TK, -torch.inf)
    weight_TK = softmax(torch.where(any_T1, masked_TK, 0.0))
    return torch.where(any_T1 & counts_TK, weight_TK, 0.0)


FAR_BELOW = -20.0
"""Below this logit `log(1 + e^z)` is `e^z` in float32, and the square root's slope would be infinite times zero."""


def sqrt_softplus(logit: Tensor) -> Tensor:
    """`sqrt(log(1 + e^z))`, with a finite gradient everywhere. Source: DeepSeek-AI 2026 (DeepSeek-V4), section 2.1."""
    return log_sqrt_softplus(logit).exp()


def log_sqrt_softplus(logit: Tensor) -> Tensor:
    """The logarithm of `sqrt_softplus`."""
    near = torch.nn.functional.softplus(logit.clamp_min(FAR_BELOW)).log()
    return torch.where(logit > FAR_BELOW, near, logit) / 2
