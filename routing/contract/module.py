"""RouterModule: what our routers share; the buffers that a cast leaves alone, operations, precision.

Shapes: T tokens, K experts per token, L MoE layers, R = E + Z routable experts.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from .assignment import Routing
from .context import Carry, RoutingContext
from .router import RouterSizes
from .stats import RouterStats


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

    def notes(self) -> list[Tensor]:
        """Most routers read nothing else after a step."""
        return []

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
