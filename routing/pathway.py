"""MoE++'s pathway-aware router: each layer's logits add a linear map of the previous layer's.

Source: Jin et al. 2024 (MoE++), arXiv:2410.07348, eq. 6.

Shapes: T tokens, D model width, R routable experts.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .classic import ClassicRouter
from .router import Carry, RouterSizes, RoutingContext
from .rule import ClassicRule

LOGIT = "previous_logit"


class PathwayRouter(ClassicRouter):
    """A classic router with a gating residual; raw logits are carried, with gradient.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves; layer 0 has no predecessor.
        rule: how logits become a routing.
    """

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule) -> None:
        super().__init__(sizes, layer, rule)
        R = sizes.num_routable
        self.residual_weight = nn.Parameter(torch.empty(R, R)) if layer else None

    def logits(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry]:
        logit_TR, carry = super().logits(x_TD, carry, context)
        before_TR = carry.get(LOGIT)
        if self.residual_weight is not None and before_TR is not None:
            logit_TR = logit_TR + linear(before_TR, self.residual_weight.to(logit_TR.dtype))
        return logit_TR, carry.put(**{LOGIT: logit_TR})
