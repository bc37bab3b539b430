"""The contract of every router: what it sees, what it carries from layer to layer, what it returns.

Shapes: T tokens, D model width, R = E + Z routable experts (FFN and zero-compute).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from .assignment import Routing
from .stats import RouterStats


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


@runtime_checkable
class Router(Protocol):
    """One per MoE layer; may hold a reference to a core that all layers share.

    `is_causal` says whether, outside training, a token's routing depends on earlier tokens only, so that the model can
    generate.
    """

    is_causal: bool

    def flops(self) -> float:
        """Operations of one token in one call: two per entry of every matrix that it is multiplied with."""
        ...

    def begin(self, context: RoutingContext) -> Carry:
        """The carry that enters the first MoE layer of a forward pass; only layer 0's router is asked."""
        ...

    def __call__(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        """Route the normed inputs of this layer's experts."""
        ...

    def post_step(self, count_R: Tensor, num_tokens: int) -> None:
        """After an optimiser step, with its counts and valid tokens over all micro-batches and ranks; no gradient."""
        ...


@dataclass(frozen=True, kw_only=True)
class RouterSizes:
    """The sizes that every router is built from.

    Args:
        width: D.
        num_experts: E.
        top_k: K.
        num_layers: L, MoE layers.
        zero_compute: kinds of the Z zero-compute experts, in the order of their ids.
        vocab_size: V, for routers that hash token ids.

    Raises:
        ValueError: if a size is not positive or K exceeds E + Z.
    """

    width: int
    num_experts: int
    top_k: int
    num_layers: int
    zero_compute: tuple[str, ...] = ()
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("width", "num_experts", "num_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 1 <= self.top_k <= self.num_routable:
            raise ValueError(f"top_k must lie in 1..{self.num_routable} (E + Z); got {self.top_k}")

    @property
    def num_zero_compute(self) -> int:
        """Z."""
        return len(self.zero_compute)

    @property
    def num_routable(self) -> int:
        """R = E + Z."""
        return self.num_experts + self.num_zero_compute


class ExactBuffers(nn.Module):
    """A module whose floating-point buffers keep their dtype (float32 as built), bit for bit, in a model of any dtype.

    A model collects the names of `exact_buffers` from its modules, so that a checkpoint loads them in float32 as well.
    """

    @property
    def exact_buffers(self) -> list[str]:
        """Names of this module's own buffers that a cast leaves alone."""
        return [name for name, buffer in self.named_buffers(recurse=False) if buffer.is_floating_point()]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: getattr(self, name) for name in self.exact_buffers}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, after.to(before.dtype) if before.is_meta else before.to(after.device))
        return self


class RouterModule(ExactBuffers):
    """What our routers share: an empty carry, nothing to do after a step, statistics over valid tokens.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves.

    `option_groups` are the frozen dataclasses whose fields are the options of a config.json.
    """

    is_causal = True
    has_fixed_top_k = False
    balance_loss = "none"
    option_groups: ClassVar[tuple[type, ...]] = ()

    def __init__(self, sizes: RouterSizes, layer: int) -> None:
        super().__init__()
        self.sizes, self.layer = sizes, layer

    @classmethod
    def build(cls, sizes: RouterSizes, *options: Any) -> list[nn.Module]:
        """One router per MoE layer.

        Args:
            sizes: of all of them.
            options: one value of each of the class's `option_groups`, which are frozen dataclasses.
        """
        return [cls(sizes, layer, *options) for layer in range(sizes.num_layers)]

    def flops(self) -> float:
        """Two per entry of this module's matrices; tables are read, not multiplied."""
        return matrix_flops(self)

    def begin(self, context: RoutingContext) -> Carry:
        return Carry()

    def post_step(self, count_R: Tensor, num_tokens: int) -> None:
        """Stateless routers have nothing to update."""

    @staticmethod
    def expect_counts(count_R: Tensor) -> Tensor:
        """The counts of a step. Raises ValueError if one is negative or no finite number."""
        if not (torch.isfinite(count_R) & (count_R >= 0)).all():
            raise ValueError(f"counts of tokens per expert must be finite and not negative; got {count_R.tolist()}")
        return count_R

    def init_parameters(self, std: float) -> None:
        """Initialise this module's own parameters; `std` is the model's initialiser range.

        Only through `torch.nn.init`, whose functions transformers guards while it loads a checkpoint.
        """
        for parameter in self.parameters(recurse=False):
            nn.init.normal_(parameter, std=std)

    def top_k(self, context: RoutingContext) -> int:
        """K of this call. Raises ValueError if the context asks for a K that this router cannot give."""
        if context.top_k is None or context.top_k == self.sizes.top_k:
            return self.sizes.top_k
        if self.has_fixed_top_k:
            raise ValueError(f"{type(self).__name__} cannot change K between calls; got top_k = {context.top_k}")
        if type(context.top_k) is not int or not 1 <= context.top_k <= self.most_choices:
            raise ValueError(
                f"top_k of a call must be a whole number in 1..{self.most_choices}, the experts that a token can "
                f"choose from; got {context.top_k!r}"
            )
        return context.top_k

    @property
    def most_choices(self) -> int:
        """The largest K of a call."""
        return self.sizes.num_routable

    def biased(self, logit_TR: Tensor, context: RoutingContext) -> Tensor:
        """The logits with this layer's row of the call's bias. Raises ValueError if the bias is not [L, R]."""
        bias_LR, wanted = context.logit_bias_LR, (self.sizes.num_layers, self.sizes.num_routable)
        if bias_LR is None:
            return logit_TR
        if bias_LR.shape != wanted or not bias_LR.is_floating_point():
            raise ValueError(
                f"logit_bias_LR must be floating point {wanted}, MoE layers x routable experts (E + Z); "
                f"got {bias_LR.dtype} {tuple(bias_LR.shape)}"
            )
        return logit_TR + bias_LR[self.layer].to(logit_TR.dtype)

    def expect_no_logit_bias(self, context: RoutingContext) -> None:
        """Raises ValueError if the call has a bias, for routers whose choice has no logits to add it to."""
        if context.logit_bias_LR is not None:
            raise ValueError(f"{type(self).__name__} takes no logit bias: its experts are not chosen by logits")

    def target_share_R(self, device: torch.device) -> Tensor | None:
        """The load shares that the balance loss aims at; None means uniform."""
        return None

    def routing(self, expert_TK: Tensor, weight_TK: Tensor) -> Routing:
        """A routing of this router's sizes."""
        return Routing(
            expert_TK=expert_TK,
            weight_TK=weight_TK,
            num_experts=self.sizes.num_experts,
            num_zero_compute=self.sizes.num_zero_compute,
        )

    def stats(
        self,
        chosen: Routing,
        kept: Routing,
        context: RoutingContext,
        *,
        probability_TR: Tensor,
        logit_TR: Tensor | None = None,
        penalty_T: Tensor | None = None,
    ) -> RouterStats:
        """The raw quantities of one call of this router; padding tokens do not count."""
        valid_T = context.is_valid_T

        def of_valid(x: Tensor | None) -> Tensor | None:
            return x if x is None or valid_T is None else x[valid_T]

        counted = self.routing(of_valid(chosen.expert_TK), of_valid(chosen.weight_TK))
        return RouterStats(
            chosen=counted,
            kept=counted if kept is chosen else self.routing(of_valid(kept.expert_TK), of_valid(kept.weight_TK)),
            probability_TR=of_valid(probability_TR),
            logit_TR=of_valid(logit_TR),
            sequence_T=of_valid(context.sequence_T),
            target_share_R=self.target_share_R(probability_TR.device),
            balance_loss=self.balance_loss,
            penalty_T=of_valid(penalty_T),
        )


def drop_padding(routing: Routing, context: RoutingContext) -> Routing:
    """The routing with every slot of a padding token empty."""
    if context.is_valid_T is None:
        return routing
    return routing.drop(~context.is_valid_T[:, None].expand_as(routing.expert_TK))


def matrix_flops(module: nn.Module) -> float:
    """Two per entry of every matrix of a module; the tables of embeddings, which are read, cost nothing."""
    owners = (owner for owner in module.modules() if not isinstance(owner, nn.Embedding))
    matrices = {p for owner in owners for p in owner.parameters(recurse=False) if p.ndim == 2}
    return 2.0 * sum(matrix.numel() for matrix in matrices)


def at_least_float32(x: Tensor) -> Tensor:
    """Routers compute in float32, or in float64 when the model does."""
    return x if x.dtype == torch.float64 else x.float()
