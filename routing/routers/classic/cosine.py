"""XMoE's router: cosine similarity between a low-dimensional projection of the token and expert directions.

Source: Chi et al. 2022 (X-MoE), arXiv:2204.09179, eqs. 3-4; temperature as in Tutel's cosine gate.

Shapes: T tokens, D model width, R routable experts, p = width of the projection.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from ...contract.context import Carry, RoutingContext
from ...contract.router import RouterSizes
from ..options import Options, expect_at_least
from .classic import ClassicRouter
from .rule import RULE_PARTS, ClassicRule

# The clamp of Tutel's cosine gate; beyond it a softmax of cosines is close to one-hot and its gradient vanishes.
MAX_SCALE = 100.0


@dataclass(frozen=True, kw_only=True)
class CosineOptions(Options):
    """Options of X-MoE besides those of the rule.

    Args:
        projection_width: p, at least 1.
        temperature: the scale starts at its inverse; at least 0.01.

    Raises:
        ValueError: if a value is out of range.
    """

    projection_width: int = 256
    temperature: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_at_least("projection_width", self.projection_width, 1)
        expect_at_least("temperature", self.temperature, 1 / MAX_SCALE)


class CosineRouter(ClassicRouter):
    """Logits are cosines times a learnt scale, which is at most 100.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves.
        rule: how logits become a routing.
        options: width of the projection and starting temperature.
    """

    option_groups: ClassVar[tuple[type, ...]] = (*RULE_PARTS, CosineOptions)

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule, options: CosineOptions) -> None:
        super().__init__(sizes, layer, rule, score_width=options.projection_width)
        self.projection = nn.Parameter(torch.empty(options.projection_width, sizes.width))
        self.log_scale = nn.Parameter(torch.empty(1))
        self.temperature = options.temperature

    def init_parameters(self, std: float) -> None:
        super().init_parameters(std)
        nn.init.constant_(self.log_scale, math.log(1 / self.temperature))

    def logits(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry]:
        projected = normalize(linear(x_TD, self.projection.to(x_TD.dtype)), dim=-1)
        direction = normalize(self.weight.to(x_TD.dtype), dim=-1)
        scale = self.log_scale.to(x_TD.dtype).clamp(max=math.log(MAX_SCALE)).exp()
        return linear(projected, direction) * scale, carry
