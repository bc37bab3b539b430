"""ReMoE: weights are ReLU scores, so routing is differentiable; an adaptive L1 penalty holds the sparsity.

Shapes: T tokens, D model width, R routable experts.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...contract.assignment import Routing
from ...contract.context import Carry, RoutingContext
from ...contract.module import ExactBuffers, RouterModule, at_least_float32, drop_padding
from ...contract.router import RouterSizes
from ...contract.stats import RouterStats
from ..options import Options


@dataclass(frozen=True, kw_only=True)
class ReluOptions(Options):
    """Options of ReMoE, whose defaults are the published ones.

    Args:
        initial_penalty: the penalty weight before the first step, above 0.
        penalty_growth: factor of one step, above 1.

    Raises:
        ValueError: if a value is out of range.
    """

    initial_penalty: float = 1e-8
    penalty_growth: float = 1.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_penalty <= 0 or self.penalty_growth <= 1:
            raise ValueError(
                f"expected a positive initial penalty and growth above 1; "
                f"got {self.initial_penalty} and {self.penalty_growth}"
            )


class SparsityControl(ExactBuffers):
    """One penalty weight for all layers: up by `growth` while too many experts are active, else down.

    Args:
        num_layers: L; the weight moves when all of them have reported a step.
        target_share: active share of the experts to hold, K / R.
        initial: the weight before the first step.
        growth: factor of one step.

    Source: Wang et al. 2024 (ReMoE), arXiv:2412.14711, eqs. 8-9.
    """

    def __init__(self, num_layers: int, target_share: float, initial: float, growth: float) -> None:
        super().__init__()
        self.num_layers, self.target_share, self.growth = num_layers, target_share, growth
        self.register_buffer("penalty_weight", torch.full((1,), initial))
        self._reported: list[Tensor] = []

    def report(self, active_share: Tensor) -> None:
        """The active share of one layer in this step."""
        self._reported.append(active_share)
        if len(self._reported) == self.num_layers:
            is_too_dense = torch.stack(self._reported).mean() > self.target_share
            self.penalty_weight *= torch.where(is_too_dense, self.growth, 1 / self.growth)
            self._reported.clear()


class ReluRouter(RouterModule):
    """Every expert with a positive score is active; K is what the penalty aims at on average.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves; layer 0 owns the shared control.
        control: holds the penalty weight.
    """

    has_fixed_top_k = True
    option_groups: ClassVar[tuple[type, ...]] = (ReluOptions,)

    def __init__(self, sizes: RouterSizes, layer: int, control: SparsityControl) -> None:
        super().__init__(sizes, layer)
        self.weight = nn.Parameter(torch.empty(sizes.num_routable, sizes.width))
        if layer == 0:
            self.control = control
        self._shared = (control,)  # in a tuple, or torch would register it again

    @classmethod
    def build(cls, sizes: RouterSizes, *options: Any) -> list[nn.Module]:
        """One router per MoE layer under one penalty weight, which aims at K of the R experts."""
        (own,) = options
        target_share = sizes.top_k / sizes.num_routable
        control = SparsityControl(sizes.num_layers, target_share, own.initial_penalty, own.penalty_growth)
        return [cls(sizes, layer, control) for layer in range(sizes.num_layers)]

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        self.top_k(context)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = at_least_float32(x_TD)
            logit_TR = linear(x_TD, self.weight.to(x_TD.dtype))
            logit_TR = self.biased(logit_TR, context)
            weight_TR = logit_TR.relu()
            routing = Routing.from_dense(weight_TR, weight_TR > 0, num_experts=self.sizes.num_experts)
            routing = drop_padding(routing, context)
            stats = self.stats(
                routing,
                routing,
                context,
                probability_TR=logit_TR.softmax(dim=-1),
                penalty_T=self._penalty_T(weight_TR, routing, context),
            )
        return routing, carry, stats

    @torch.no_grad()
    def post_step(self, count_R: Tensor, num_tokens: int) -> None:
        if num_tokens:
            self._shared[0].report(self.expect_counts(count_R).sum() / (num_tokens * self.sizes.num_routable))

    def _penalty_T(self, weight_TR: Tensor, routing: Routing, context: RoutingContext) -> Tensor:
        """Its mean over tokens is `lambda R / (K T^2) * sum_r count_r * (sum of r's weights)`, the balanced L1 term."""
        num_tokens = len(weight_TR) if context.is_valid_T is None else context.is_valid_T.sum()
        factor = self._shared[0].penalty_weight.to(weight_TR.dtype) * self.sizes.num_routable / self.sizes.top_k
        return factor * (weight_TR * (routing.count_R.to(weight_TR.dtype) / num_tokens)).sum(dim=-1)
