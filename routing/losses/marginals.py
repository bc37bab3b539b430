"""MarginalStats: statistics of a router over a grid of experts, by its rows and its columns.

With a million experts a distribution over experts per token cannot be held; the two over rows and columns can. Both
stand in one vector, rows first, halved so that it sums to 1: the Switch loss of that vector is the mean of the row loss
and the column loss.

Shapes: T valid tokens, R = rows + columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class MarginalStats:
    """What the trainer and the losses read of a `RouterStats`, without anything of size T times R.

    Args:
        num_tokens: tokens without padding.
        experts_per_token: heads times K; an expert that two heads chose counts twice.
        probability_R: mean probability of each row and column, halved; with gradient if a balance loss uses it.
        count_R: int64, how often each row and column was chosen.
        entropy: mean entropy of a token's distribution over rows, and over columns, in nats.
        balance_loss: the name in `routing.BALANCE_LOSSES` of the loss that this router is trained with.
    """

    num_tokens: int
    experts_per_token: int
    probability_R: Tensor
    count_R: Tensor
    entropy: Tensor
    balance_loss: str = "none"
    target_share_R: Tensor | None = None
    penalty_T: Tensor | None = None

    @property
    def num_experts(self) -> int:
        """Rows and columns."""
        return len(self.count_R)

    @property
    def kept_R(self) -> Tensor:
        """Nothing is dropped."""
        return self.count_R

    @property
    def probability_TR(self) -> Tensor:
        """Of no tokens: what looks at tokens' distributions finds none here."""
        return self.probability_R.new_zeros(0, self.num_experts)

    @property
    def logsumexp_T(self) -> Tensor:
        """0: product keys are trained without a z-loss."""
        return self.probability_R.new_zeros(1)

    @property
    def true_load(self) -> Tensor:
        """Experts per token."""
        return torch.tensor(float(self.experts_per_token))
