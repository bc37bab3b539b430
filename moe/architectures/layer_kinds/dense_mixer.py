"""DenseMixer: the forward pass is sparse, the router's gradient that of all experts.

Shapes: T tokens, D model width, R routable experts, E experts.
"""

import torch
from torch import Tensor

from routing import Carry, RouterStats, RoutingContext, build_routers

from ...layers.layer import MoELayer
from ...parts.config import MoEConfig
from ..body import Body


class DenseMixerLayer(MoELayer):
    """In training every expert computes every token, and the router learns what each would have added.

    Values, and the gradients of experts and inputs, are those of the sparse layer. A router whose weights are not
    renormalised is meant: the gradient of an expert's weight is that of its probability. Costs E / K times the experts'
    operations in training, and nothing afterwards.

    Source: Yao et al. 2025 (DenseMixer), its eq. 5 (straight-through estimator of the top-k).
    """

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, list[RouterStats]]:
        routing, carry, stats = self.router(x_TD, carry, context)
        if not context.is_training:
            return self.compute(x_TD, routing), carry, [stats]
        y_TD = self.compute(x_TD, routing.__class__(**vars(routing) | {"weight_TK": routing.weight_TK.detach()}))
        share_TE = self._shares(stats, context)
        # 0 as a value, and a gradient to every probability: what the expert computes
        all_TE = torch.arange(share_TE.shape[1], device=x_TD.device).expand_as(share_TE)
        return y_TD + self.experts(x_TD, all_TE, share_TE - share_TE.detach()), carry, [stats]

    def _shares(self, stats: RouterStats, context: RoutingContext) -> Tensor:
        """[T, E] probabilities of FFN experts, 0 for padding."""
        share_TE = stats.probability_TR[:, : stats.num_experts]
        if context.is_valid_T is None:
            return share_TE
        return share_TE.new_zeros(len(context.is_valid_T), share_TE.shape[1]).index_put((context.is_valid_T,), share_TE)


def dense_mixer(config: MoEConfig) -> Body:
    """Any router with weights that are probabilities.

    Raises:
        ValueError: if the router's weights are not probabilities of all experts.
    """
    if config.router not in PROBABILITIES:
        raise ValueError(
            f"the architecture 'dense_mixer' needs weights that are probabilities; take one of the routers "
            f"{', '.join(PROBABILITIES)}; got {config.router!r}"
        )
    routers = build_routers(config.router, config.router_sizes, config.router_options)
    return Body(layers=[DenseMixerLayer(config, router) for router in routers])


PROBABILITIES = ("olmoe", "switch", "classic", "resident", "pool")
