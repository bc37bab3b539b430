"""The contract of every router: what it sees, what it carries from layer to layer, what it returns.

Shapes: T tokens, D model width, R = E + Z routable experts (FFN and zero-compute).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from .assignment import Routing


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingContext:
    """What a router may look at besides the token's hidden state; the same for all layers of a forward pass.

    Args:
        is_training: whether capacity limits, noise and the like apply.
        step: optimiser steps taken so far, for schedules.
        token_id_T: int64 vocabulary ids, for routers that hash them.
        position_T: int64 position of each token in its sequence.
        is_valid_T: bool, False for padding; None when no token is padding.
        logit_bias_LR: added to the logits of layer l (rewiring at test time, task bias), or None.
    """

    is_training: bool = False
    step: int = 0
    token_id_T: Tensor | None = None
    position_T: Tensor | None = None
    is_valid_T: Tensor | None = None
    logit_bias_LR: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Carry:
    """Token-aligned tensors on their way from layer to layer: a recurrent state, earlier logits, a pre-gated plan.

    It starts empty in every forward pass and never crosses decode steps.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(name)

    def put(self, **tensors: Tensor) -> Self:
        """A carry with some tensors added or replaced."""
        return replace(self, tensors={**self.tensors, **tensors})

    def drop(self, *names: str) -> Self:
        """A carry without some tensors."""
        return replace(self, tensors={name: value for name, value in self.tensors.items() if name not in names})

    def gather(self, token_id: Tensor) -> Self:
        """The carry of some tokens, for layers that process a subset or another order."""
        return replace(self, tensors={name: value[token_id] for name, value in self.tensors.items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterStats:
    """Raw quantities of one router call over its valid tokens; losses and their weights live in `routing.losses`.

    Args:
        probability_R: mean router probability per routable expert, with gradient.
        count_R: int64 tokens that chose each routable expert, before any capacity drop.
        kept_R: the same after capacity drops; `kept_R[:E]` is the load that the FFN experts compute.
        logsumexp_T: log of the summed exponentials of each token's logits, with gradient.
        entropy: mean entropy of the router's distribution in nats, no gradient.
        num_tokens: valid tokens.
        num_experts: E.
    """

    probability_R: Tensor
    count_R: Tensor
    kept_R: Tensor
    logsumexp_T: Tensor
    entropy: Tensor
    num_tokens: int
    num_experts: int


@runtime_checkable
class Router(Protocol):
    """One per MoE layer; may hold a reference to a core that all layers share."""

    def begin(self, context: RoutingContext) -> Carry:
        """The carry that enters the first MoE layer of a forward pass; only layer 0's router is asked."""
        ...

    def __call__(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        """Route the normed inputs of this layer's experts."""
        ...

    def post_step(self, count_R: Tensor) -> None:
        """After an optimiser step, with this step's counts summed over micro-batches and ranks; no gradient."""
        ...


@dataclass(frozen=True, kw_only=True)
class RouterSizes:
    """The sizes that every router is built from.

    Args:
        width: D.
        num_experts: E.
        num_zero_compute: Z.
        top_k: K.
        num_layers: L, MoE layers.

    Raises:
        ValueError: if a size is not positive or K exceeds E + Z.
    """

    width: int
    num_experts: int
    top_k: int
    num_layers: int
    num_zero_compute: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "num_experts", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.num_zero_compute < 0:
            raise ValueError(f"num_zero_compute must not be negative; got {self.num_zero_compute}")
        if not 1 <= self.top_k <= self.num_routable:
            raise ValueError(f"top_k must lie in 1..{self.num_routable} (E + Z); got {self.top_k}")

    @property
    def num_routable(self) -> int:
        """R = E + Z."""
        return self.num_experts + self.num_zero_compute


def router_stats(
    probability_TR: Tensor, logit_TR: Tensor, chosen: Routing, kept: Routing, is_valid_T: Tensor | None
) -> RouterStats:
    """Reduce one router call to its raw statistics; padding tokens do not count."""
    if is_valid_T is not None:
        probability_TR, logit_TR = probability_TR[is_valid_T], logit_TR[is_valid_T]
        chosen, kept = _select(chosen, is_valid_T), _select(kept, is_valid_T)
    with torch.no_grad():
        entropy = torch.special.entr(probability_TR).sum(dim=-1).mean()
    return RouterStats(
        probability_R=probability_TR.mean(dim=0),
        count_R=chosen.count_R,
        kept_R=kept.count_R,
        logsumexp_T=logit_TR.logsumexp(dim=-1),
        entropy=entropy,
        num_tokens=probability_TR.shape[0],
        num_experts=chosen.num_experts,
    )


def _select(routing: Routing, is_valid_T: Tensor) -> Routing:
    return replace(routing, expert_TK=routing.expert_TK[is_valid_T], weight_TK=routing.weight_TK[is_valid_T])
