"""Latent MoE: routed experts compute in a space narrower than the model, router and shared experts in the model's.

Shapes: T tokens, D model width.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from routing import Router, Routing, build_routers

from ...experts.bank import Experts
from ...layers.layer import MoELayer
from ...parts.config import MoEConfig
from ...parts.flops import LayerFlops
from ...parts.linear import Linear
from ..body import Body, expect_choices


class NarrowLayer(MoELayer):
    """`y = up(sum of w_e expert_e(down x)) + shared(x)`; an expert moves and computes `width / D` of an ordinary one.

    Args:
        config: the model's config; zero-compute experts add to the model's width, as shared ones do.
        router: reads the full width.
        width: of the experts' space, 1..D.

    Source: NVIDIA 2026 (Nemotron 3), LatentMoE.
    """

    def __init__(self, config: MoEConfig, router: Router, width: int) -> None:
        narrow = copy.copy(config)
        narrow.hidden_size = width
        super().__init__(config, router, Experts(narrow))
        self.down = Linear(config.hidden_size, width)
        self.up = Linear(width, config.hidden_size)

    def compute(self, x_TD: Tensor, routing: Routing) -> Tensor:
        y_TD = self.up(self.experts(self.down(x_TD), *routing.ffn_view()))
        if self.zero_compute is not None:
            y_TD = y_TD + self.zero_compute(x_TD, routing)
        return y_TD if self.shared is None else y_TD + self.shared(x_TD)

    def flops(self, loads: Sequence[Tensor], passes: float) -> LayerFlops:
        """The two projections, which every token passes, count as shared."""
        found = super().flops(loads, passes)
        projections = 2.0 * (self.down.weight.numel() + self.up.weight.numel())
        return replace(found, shared=found.shared + passes * projections)


def latent_moe(config: MoEConfig, *, width: int | None = None) -> Body:
    """Any router, and experts in a space of `width` (a quarter of D if None).

    Raises:
        ValueError: if the width is out of range.

    Source: NVIDIA 2026 (Nemotron 3), LatentMoE.
    """
    expect_choices(config)
    width = max(1, config.hidden_size // 4) if width is None else width
    if not 1 <= width <= config.hidden_size:
        raise ValueError(f"width must lie in 1..{config.hidden_size} (D); got {width}")
    routers = build_routers(config.router, config.router_sizes, config.router_options)
    return Body(layers=[NarrowLayer(config, router, width) for router in routers])
