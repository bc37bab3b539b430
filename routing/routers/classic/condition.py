"""MoDE's router: a small network over the token and a condition (noise level, task), or over the condition alone.

Source: Reuss et al. 2024 (MoDE), arXiv:2412.12953, section 3 and appendix.

Shapes: T tokens, D model width and width of a condition, K experts per token, R routable experts.
"""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from ...contract.assignment import Routing
from ...contract.context import Carry, RoutingContext
from ...contract.router import RouterSizes
from ...contract.stats import RouterStats
from ..options import expect_one_of
from .classic import ClassicRouter
from .rule import ClassicRule

Reads = Literal["condition", "token_and_condition"]


class ConditionRouter(ClassicRouter):
    """Two linear maps with a GELU between; in training experts are drawn by their probability, without replacement.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves.
        rule: how logits become a routing.
        reads: the `condition` alone, so that all tokens of a sequence go to the same experts, or
            `token_and_condition`.
        inner_width: of the network; 2 D if not given.
        samples: whether training draws experts; without, it takes the best as everywhere else.

    A call without a condition has the condition 0.
    """

    def __init__(
        self,
        sizes: RouterSizes,
        layer: int,
        rule: ClassicRule,
        reads: Reads = "condition",
        inner_width: int | None = None,
        samples: bool = True,
    ) -> None:
        inner_width = 2 * sizes.width if inner_width is None else inner_width
        if inner_width < 1:
            raise ValueError(f"inner_width must be at least 1; got {inner_width}")
        super().__init__(sizes, layer, rule, score_width=inner_width)
        expect_one_of("reads", reads, get_args(Reads))
        self.reads, self.samples = reads, samples
        self.inner = nn.Parameter(torch.empty(inner_width, sizes.width * (1 if reads == "condition" else 2)))

    def init_parameters(self, std: float) -> None:
        super().init_parameters(0.02)

    def logits(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry]:
        condition_TD = torch.zeros_like(x_TD) if context.condition_TD is None else context.condition_TD.to(x_TD)
        read = condition_TD if self.reads == "condition" else torch.cat([x_TD, condition_TD], dim=-1)
        hidden = gelu(linear(read, self.inner.to(x_TD.dtype)))
        return linear(hidden, self.weight.to(x_TD.dtype)), carry

    def select(self, logit_TR: Tensor, score_TR: Tensor, context: RoutingContext) -> Tensor:
        if not (context.is_training and self.samples):
            return super().select(logit_TR, score_TR, context)
        # experts whose probability vanished stay drawable, as fewer than K others may be left
        probability_TR = logit_TR.softmax(dim=-1).clamp_min(torch.finfo(logit_TR.dtype).tiny)
        return probability_TR.multinomial(self.top_k(context), replacement=False)

    def stats(self, chosen: Routing, kept: Routing, context: RoutingContext, **fields: Any) -> RouterStats:
        """The published balance loss sees the weights of the selected, renormalised, instead of all probabilities."""
        empty_TR = fields["probability_TR"].new_zeros(len(chosen.expert_TK), self.sizes.num_routable + 1)
        weight_TR = empty_TR.scatter_add(1, chosen.expert_TK, chosen.weight_TK.to(empty_TR.dtype))
        fields["probability_TR"] = weight_TR[:, : self.sizes.num_routable]
        return super().stats(chosen, kept, context, **fields)
