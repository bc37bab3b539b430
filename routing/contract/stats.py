"""RouterStats: the raw quantities of one router call; what is derived from them is computed when it is asked for.

Shapes: T valid tokens, R = E + Z routable experts, B sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from .assignment import Routing


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterStats:
    """One router call over its valid tokens; losses and their weights live in `routing.losses`.

    Args:
        probability_TR: the distribution that balance losses see, with gradient.
        chosen: what the router chose, before any capacity drop.
        kept: what is left after capacity drops, and is computed.
        logit_TR: raw logits with gradient; None for routers without.
        sequence_T: int64 row of the batch that each token belongs to, or None.
        target_share_R: the load shares that the balance loss aims at; None means uniform.
        balance_loss: the name in `routing.BALANCE_LOSSES` of the loss that this router is trained with.
        penalty_T: per token, a regulariser that the router weighs itself (ReMoE's adaptive L1), or None.
        step_load_R: tokens per routable expert in the last optimiser step, over all its micro-batches and processes; 0
            before the first. None where no loss reads it.
    """

    probability_TR: Tensor
    chosen: Routing
    kept: Routing
    logit_TR: Tensor | None = None
    sequence_T: Tensor | None = None
    target_share_R: Tensor | None = None
    balance_loss: str = "switch"
    penalty_T: Tensor | None = None
    step_load_R: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Valid tokens."""
        return self.probability_TR.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.chosen.num_experts

    @cached_property
    def probability_R(self) -> Tensor:
        """Mean router probability per routable expert, with gradient."""
        return mean_over_tokens(self.probability_TR)

    @cached_property
    def count_R(self) -> Tensor:
        """int64 tokens that chose each routable expert, before any capacity drop."""
        return self.chosen.count_R

    @cached_property
    def kept_R(self) -> Tensor:
        """The same after capacity drops; `kept_R[:E]` is the load that the FFN experts compute."""
        return self.count_R if self.kept is self.chosen else self.kept.count_R

    @cached_property
    def logsumexp_T(self) -> Tensor:
        """Log of the summed exponentials of each token's logits, with gradient; 0 for routers without logits."""
        if self.logit_TR is None:
            return self.probability_TR.new_zeros(self.num_tokens)
        return self.logit_TR.logsumexp(dim=-1)

    @cached_property
    def entropy(self) -> Tensor:
        """Mean entropy of the router's distribution in nats, no gradient."""
        return mean_over_tokens(torch.special.entr(self.probability_TR.detach()).sum(dim=-1))

    @property
    def true_load(self) -> Tensor:
        """FFN experts that a token visits on average, after capacity drops."""
        return self.kept_R[: self.num_experts].sum() / max(self.num_tokens, 1)

    @classmethod
    def joined(cls, calls: Sequence[Self]) -> Self:
        """Several calls of one router in a forward pass as one, whose rows are the rows of all of them."""
        if len(calls) == 1:
            return calls[0]
        return replace(
            calls[0],
            probability_TR=torch.cat([call.probability_TR for call in calls]),
            chosen=_joined_routing([call.chosen for call in calls]),
            kept=_joined_routing([call.kept for call in calls]),
            logit_TR=_joined_rows([call.logit_TR for call in calls]),
            sequence_T=_joined_rows([call.sequence_T for call in calls]),
            penalty_T=_joined_rows([call.penalty_T for call in calls]),
        )


def mean_over_tokens(x: Tensor) -> Tensor:
    """Mean over the first axis; 0, with gradient 0, for a call without valid tokens."""
    return x.mean(dim=0) if len(x) else x.sum(dim=0)


def _joined_rows(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if len(present) == len(parts) else None


def _joined_routing(parts: Sequence[Routing]) -> Routing:
    """Rows of all parts; shorter rows are padded with empty slots."""
    K = max(part.expert_TK.shape[1] for part in parts)
    missing = [(0, K - part.expert_TK.shape[1]) for part in parts]
    return replace(
        parts[0],
        expert_TK=torch.cat(
            [pad(part.expert_TK, add, value=part.empty_id) for part, add in zip(parts, missing, strict=True)]
        ),
        weight_TK=torch.cat([pad(part.weight_TK, add) for part, add in zip(parts, missing, strict=True)]),
    )
