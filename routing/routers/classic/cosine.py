"""XMoE's router: cosine similarity between a low-dimensional projection of the token and expert directions.

Source: Chi et al. 2022 (X-MoE), arXiv:2204.09179, eqs. 3-4; temperature as in Tutel's cosine gate.

Shapes: T tokens, D model width, R routable experts, p = width of the projection.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from ...contract.router import Carry, RouterSizes, RoutingContext
from .classic import ClassicRouter
from .rule import ClassicRule

MAX_SCALE = 100.0


class CosineRouter(ClassicRouter):
    """Logits are cosines times a learnt scale, which is at most 100.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves.
        rule: how logits become a routing.
        projection_width: p.
        temperature: the scale starts at its inverse.
    """

    def __init__(
        self, sizes: RouterSizes, layer: int, rule: ClassicRule, projection_width: int = 256, temperature: float = 0.5
    ) -> None:
        if projection_width < 1:
            raise ValueError(f"projection_width must be at least 1; got {projection_width}")
        if temperature < 1 / MAX_SCALE:
            raise ValueError(f"temperature must be at least {1 / MAX_SCALE}; got {temperature}")
        super().__init__(sizes, layer, rule, score_width=projection_width)
        self.projection = nn.Parameter(torch.empty(projection_width, sizes.width))
        self.log_scale = nn.Parameter(torch.empty(1))
        self.temperature = temperature

    def init_parameters(self, std: float) -> None:
        super().init_parameters(std)
        nn.init.constant_(self.log_scale, math.log(1 / self.temperature))

    def logits(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry]:
        projected = normalize(linear(x_TD, self.projection.to(x_TD.dtype)), dim=-1)
        direction = normalize(self.weight.to(x_TD.dtype), dim=-1)
        scale = self.log_scale.to(x_TD.dtype).clamp(max=math.log(MAX_SCALE)).exp()
        return linear(projected, direction) * scale, carry
