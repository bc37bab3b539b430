"""MoHD: a router chooses which groups of features of a token the feed-forward network reads and writes.

x' = scale * (x_shared, w_1 x_1, ..., w_E x_E), w = 0 outside the K chosen groups; y = fuse(mask * FFN(x')). What
survives is scaled up by all over active features; a fusion mixes the groups, so that features reach those not chosen.

Source: Chen et al. 2024 (MoHD), arXiv:2412.05644: sub-dimensions shared and specialised, activation scaling, group
fusion. The paper's internals could not be read; the forms here are ours.

Shapes: T tokens, D model width, E groups of features (`config.num_experts`), K chosen groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from routing import Carry, RouterModule, RouterStats, Routing, RoutingContext, build_routers

from ..layers.layer import FeedForward, RoutedLayer
from ..parts.config import MoEConfig
from ..parts.flops import LayerFlops
from .body import Body


def feature_groups(config: MoEConfig, *, shared_width: int | None = None) -> Body:
    """A dense feed-forward network of `intermediate_size` per layer over routed groups of features.

    Args:
        config: its `num_experts` groups share what `shared_width` (a quarter of D if not given) leaves of D.
        shared_width: features that every token keeps.

    Raises:
        ValueError: if the groups do not divide the rest, or the router is not one of tokens to groups.
    """
    D, E = config.hidden_size, config.num_experts
    shared_width = D // 4 if shared_width is None else shared_width
    if not 0 <= shared_width < D or (D - shared_width) % E:
        raise ValueError(
            f"num_experts ({E}) groups must divide hidden_size - shared_width ({D} - {shared_width}); "
            "change shared_width or num_experts"
        )
    if config.zero_compute_experts or config.num_shared_experts:
        raise ValueError("feature groups have no zero-compute or shared experts; shared_width is their shared part")
    routers = build_routers(config.router, config.router_sizes, config.router_options)
    if not all(isinstance(router, RouterModule) for router in routers):
        raise ValueError(f"feature groups need a router of tokens to groups; got {config.router!r}")
    return Body(layers=[FeatureGroupLayer(config, router, shared_width) for router in routers])


class GroupFusion(nn.Module):
    """Mixes the groups, place by place within a group; starts as the identity.

    Args:
        num_groups: E, groups of features that are fused.
        group_width: features of a group.
    """

    def __init__(self, num_groups: int, group_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(group_width, num_groups, num_groups))

    def init_parameters(self, std: float) -> None:
        """Identity; through `torch.nn.init` only, which transformers guards while it loads a checkpoint."""
        nn.init.zeros_(self.weight)
        for place in self.weight.unbind(0):
            nn.init.eye_(place)

    def forward(self, x_TEW: Tensor) -> Tensor:
        return torch.einsum("tew,wfe->tfw", x_TEW, self.weight.to(x_TEW.dtype))


class FeatureGroupLayer(RoutedLayer):
    """A router over groups of features, a feed-forward network, and the fusion of the groups.

    Args:
        shared_width: features that every token keeps.
    """

    def __init__(self, config: MoEConfig, router: RouterModule, shared_width: int) -> None:
        super().__init__()
        self.router, self.shared_width = router, shared_width
        self.group_width = (config.hidden_size - shared_width) // config.num_experts
        self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.fusion = GroupFusion(config.num_experts, self.group_width)

    @property
    def routers(self) -> list[nn.Module]:
        return [self.router]

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, list[RouterStats]]:
        routing, carry, stats = self.router(x_TD, carry, context)
        weight_TD, active_TD = self.masks(routing, x_TD.dtype)
        scale = x_TD.shape[1] / active_TD.sum(dim=-1, keepdim=True)
        y_TD = self.feed_forward(x_TD * weight_TD * scale) * active_TD
        shared, grouped = y_TD.split([self.shared_width, y_TD.shape[1] - self.shared_width], dim=-1)
        fused_TEW = self.fusion(grouped.unflatten(-1, (-1, self.group_width)))
        return torch.cat([shared, fused_TEW.flatten(1)], dim=-1), carry, [stats]

    def masks(self, routing: Routing, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[T, D] twice: router weights times the number of groups chosen (1 on shared features), and 1 where active."""
        T, K = routing.expert_TK.shape
        weight_TR = routing.weight_TK.new_zeros(T, routing.num_routable + 1)
        weight_TR = weight_TR.scatter_add(1, routing.expert_TK, routing.weight_TK * K)
        active_TR = torch.zeros_like(weight_TR).scatter(1, routing.expert_TK, 1.0)
        return self._spread(weight_TR[:, :-1]).to(dtype), self._spread(active_TR[:, :-1]).to(dtype)

    def _spread(self, group_TE: Tensor) -> Tensor:
        shared = group_TE.new_ones(len(group_TE), self.shared_width)
        return torch.cat([shared, group_TE.repeat_interleave(self.group_width, dim=-1)], dim=-1)

    def flops(self, loads: Sequence[Tensor], passes: float) -> LayerFlops:
        """Only active features count, as a gathering implementation would compute; here the others are times 0."""
        inner_width, _ = self.feed_forward.gate_proj.weight.shape
        active = self.group_width * sum(float(load_R.sum()) for load_R in loads)
        return LayerFlops(
            experts=2 * 3 * inner_width * active,
            shared=passes * (2 * 3 * inner_width * self.shared_width + 2 * self.fusion.weight.numel()),
        )
