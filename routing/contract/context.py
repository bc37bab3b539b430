"""What a router may look at besides hidden states, and what is handed from layer to layer.

Shapes: T tokens, D model width, L MoE layers, R routable experts (FFN and zero-compute).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingContext:
    """What a router may look at besides the token's hidden state; the same for all layers of a forward pass.

    Args:
        is_training: whether capacity limits, noise and the like apply.
        step: optimiser steps taken so far, for schedules.
        token_id_T: int64 vocabulary ids, for routers that hash them.
        position_T: int64 position of each token in its sequence.
        sequence_T: int64 row of the batch that each token belongs to, for sequence-wise losses.
        is_valid_T: bool, False for padding; None when no token is padding.
        logit_bias_LR: added to the logits of layer l (rewiring at test time, task bias), or None; -inf forbids an
            expert.
        top_k: experts per token in this call instead of the configured K, or None.
        condition_TD: what a call is conditioned on (noise level, task), as an embedding per token, or None.
        modality_T: int64 modality of each token, or None.
        cache: the key/value cache of this pass (transformers' `Cache`), for routers with a decode state of their own.
        attention_mask: what each token may attend to, as decoder layers see it; None for plain causal attention.

    Raises:
        ValueError: if the logit bias has NaN or +inf, or forbids all experts of a layer.
    """

    is_training: bool = False
    step: int = 0
    token_id_T: Tensor | None = None
    position_T: Tensor | None = None
    sequence_T: Tensor | None = None
    is_valid_T: Tensor | None = None
    logit_bias_LR: Tensor | None = None
    top_k: int | None = None
    condition_TD: Tensor | None = None
    modality_T: Tensor | None = None
    cache: Any | None = None
    attention_mask: Tensor | None = None

    def __post_init__(self) -> None:
        bias_LR = self.logit_bias_LR
        if bias_LR is None or bias_LR.is_meta or not bias_LR.is_floating_point() or bias_LR.ndim != 2:
            return
        if not (bias_LR < torch.inf).all() or not (bias_LR > -torch.inf).any(dim=1).all():
            raise ValueError(
                "logit_bias_LR must be numbers, or -inf for experts that are not to be chosen, and leave every layer "
                "an expert; it has NaN, +inf or a layer of -inf alone"
            )


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
