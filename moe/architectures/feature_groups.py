"""MoHD: a router chooses which groups of features of a token a layer reads and writes.

x' = scale * (x_shared, w_1 x_1, ..., w_E x_E), w = 0 outside the K chosen groups; y = fuse(mask * FFN(x')). What
survives is scaled up by all over active features; a fusion mixes the groups, so that features reach those not chosen.
Only active features are multiplied: each group's slices of the matrices see the tokens that chose the group.

Source: Chen et al. 2024 (MoHD), arXiv:2412.05644: sub-dimensions shared and specialised, activation scaling, group
fusion, in attention and in the feed-forward network. The equations could not be had; the forms here are ours.

Shapes: B batch, S positions, T = B * S tokens, D model width, E groups of features (`config.num_experts`), K chosen
groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from routing import Carry, RouterModule, RouterStats, Routing, RoutingContext, build_routers

from ..layers.layer import FeedForward, RoutedLayer
from ..layers.stack import StackInputs
from ..parts.attention import Attention, rotate
from ..parts.config import MoEConfig
from ..parts.flops import LayerFlops
from ..parts.norm import RMSNorm
from .body import Body


def feature_groups(config: MoEConfig, *, shared_width: int | None = None, attention: bool = False) -> Body:
    """A dense feed-forward network of `intermediate_size` per layer over routed groups of features.

    Args:
        config: its `num_experts` groups share what `shared_width` (a quarter of D if not given) leaves of D.
        shared_width: features that every token keeps.
        attention: whether attention reads and writes the chosen groups too, by one decision per decoder layer.

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
    if attention and config.num_dense_layers:
        raise ValueError(f"with attention=true num_dense_layers must be 0; got {config.num_dense_layers}")
    routers = build_routers(config.router, config.router_sizes, config.router_options)
    if not all(isinstance(router, RouterModule) for router in routers):
        raise ValueError(f"feature groups need a router of tokens to groups; got {config.router!r}")
    layers = [FeatureGroupLayer(config, router, shared_width, attention) for router in routers]
    return Body(layers=layers, decoder_layer=FeatureGroupDecoderLayer if attention else None)


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


class ActiveFeatures:
    """Which features each token keeps, and products of matrices with those alone.

    Args:
        routing: the groups of each token, and their weights.
        shared_width: features that every token keeps; the groups follow them.
        group_width: features of a group.
    """

    def __init__(self, routing: Routing, shared_width: int, group_width: int) -> None:
        self.shared_width, self.group_width = shared_width, group_width
        T, K = routing.expert_TK.shape
        weight_TR = routing.weight_TK.new_zeros(T, routing.num_routable + 1)
        self.weight_TE = weight_TR.scatter_add(1, routing.expert_TK, routing.weight_TK * K)[:, :-1]
        is_active_TR = torch.zeros(weight_TR.shape, dtype=torch.bool, device=weight_TR.device)
        is_active_TE = is_active_TR.scatter(1, routing.expert_TK, True)[:, :-1]
        self.row_of = [is_active_T.nonzero()[:, 0] for is_active_T in is_active_TE.unbind(1)]
        width = shared_width + group_width * is_active_TE.shape[1]
        self.scale_T1 = width / (shared_width + group_width * is_active_TE.sum(dim=1, keepdim=True))

    def read(self, x_TD: Tensor, weight_OI: Tensor) -> Tensor:
        """[T, O]: a matrix times the kept features, weighed and scaled."""
        x_TD = x_TD * self.scale_T1.to(x_TD.dtype)
        y_TO = linear(x_TD[:, : self.shared_width], weight_OI[:, : self.shared_width])
        for group, row in enumerate(self.row_of):
            part = x_TD[row, self._columns(group)] * self.weight_TE[row, group, None].to(x_TD.dtype)
            y_TO = y_TO.index_add(0, row, linear(part, weight_OI[:, self._columns(group)]))
        return y_TO

    def write(self, hidden: Tensor, weight_DI: Tensor) -> tuple[Tensor, Tensor]:
        """[T, shared] and [T, E, W]: the kept features of a matrix times hidden units; the others are 0."""
        grouped = hidden.new_zeros(len(hidden), len(self.row_of), self.group_width)
        for group, row in enumerate(self.row_of):
            place = row, torch.full_like(row, group)
            grouped = grouped.index_put(place, linear(hidden[row], weight_DI[self._columns(group)]))
        return linear(hidden, weight_DI[: self.shared_width]), grouped

    def _columns(self, group: int) -> slice:
        start = self.shared_width + group * self.group_width
        return slice(start, start + self.group_width)


class FeatureGroupLayer(RoutedLayer):
    """A router over groups of features, a feed-forward network, and the fusion of the groups.

    Args:
        shared_width: features that every token keeps.
        attention: whether attention asks this layer's router, and fuses its output in a way of its own.
    """

    def __init__(self, config: MoEConfig, router: RouterModule, shared_width: int, attention: bool) -> None:
        super().__init__()
        self.router, self.shared_width = router, shared_width
        self.group_width = (config.hidden_size - shared_width) // config.num_experts
        self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.fusion = GroupFusion(config.num_experts, self.group_width)
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.attention_width = 2 * query_width + 2 * key_width if attention else 0
        self.attention_fusion = GroupFusion(config.num_experts, self.group_width) if attention else None

    @property
    def routers(self) -> list[nn.Module]:
        return [self.router]

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, list[RouterStats]]:
        routing, carry, stats = self.router(x_TD, carry, context)
        return self.compute(x_TD, self.active(routing)), carry, [stats]

    def active(self, routing: Routing) -> ActiveFeatures:
        """The features that each token keeps in this layer."""
        return ActiveFeatures(routing, self.shared_width, self.group_width)

    def compute(self, x_TD: Tensor, active: ActiveFeatures) -> Tensor:
        """[T, D]: the feed-forward network on the kept features."""
        network = self.feed_forward
        gate, up = (active.read(x_TD, proj.weight) for proj in (network.gate_proj, network.up_proj))
        return fused(self.fusion, *active.write(network.act_fn(gate) * up, network.down_proj.weight))

    def flops(self, loads: Sequence[Tensor], passes: float) -> LayerFlops:
        """What the sliced products take; `attention` is what attention does not read and write."""
        inner_width, D = self.feed_forward.gate_proj.weight.shape
        active = self.group_width * sum(float(load_R.sum()) for load_R in loads)
        fusions = [self.fusion] if self.attention_fusion is None else [self.fusion, self.attention_fusion]
        mixing = 2 * sum(fusion.weight.numel() for fusion in fusions)
        idle = passes * (D - self.shared_width) - active
        return LayerFlops(
            experts=2 * 3 * inner_width * active,
            shared=passes * (2 * 3 * inner_width * self.shared_width + mixing),
            attention=-2 * self.attention_width * idle,
        )


def fused(fusion: GroupFusion, shared: Tensor, grouped_TEW: Tensor) -> Tensor:
    """[T, D]: shared features as they are, groups mixed."""
    return torch.cat([shared, fusion(grouped_TEW).flatten(1)], dim=-1)


class FeatureGroupAttention(Attention):
    """Attention whose projections read and write the kept features of each token; keys and values too.

    Raises:
        ValueError: if its projections were to have biases, which no group of features owns.
    """

    def __init__(self, config: MoEConfig, layer_idx: int) -> None:
        if config.qkv_bias:
            raise ValueError("projections by feature groups have no biases; got qkv_bias=True")
        super().__init__(config, layer_idx)

    def attend(self, x_BSD: Tensor, active: ActiveFeatures, fusion: GroupFusion, inputs: StackInputs) -> Tensor:
        """[B, S, D]; appends this step's keys and values to the cache."""
        query, key, value = (
            active.read(x_BSD.flatten(0, 1), proj.weight).unflatten(0, x_BSD.shape[:2])
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = rotate(self._normed_heads(query, self.q_norm), *inputs.angles)
        key, value = rotate(self._normed_heads(key, self.k_norm), *inputs.angles), self._heads(value)
        if inputs.cache is not None:
            key, value = inputs.cache.update(key, value, self.layer_idx)
        y_BSHA, _ = sdpa_attention_forward(self, query, key, value, inputs.mask, scaling=self.head_dim**-0.5)
        return fused(fusion, *active.write(y_BSHA.flatten(0, 1).flatten(1), self.o_proj.weight)).view_as(x_BSD)


class FeatureGroupDecoderLayer(nn.Module):
    """Attention and feed-forward over the same groups, which the router chooses from the layer's normed input.

    Args:
        layer_idx: its place in the decoder.
        mlp: routed layer, whose router decides for both.
    """

    def __init__(self, config: MoEConfig, layer_idx: int, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = FeatureGroupAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x_BSD: Tensor, carry: Carry, inputs: StackInputs) -> tuple[Tensor, Carry, list[RouterStats]]:
        normed_BSD = self.input_layernorm(x_BSD)
        routing, carry, stats = self.mlp.router(normed_BSD.flatten(0, 1), carry, inputs.context)
        active = self.mlp.active(routing)
        x_BSD = x_BSD + self.self_attn.attend(normed_BSD, active, self.mlp.attention_fusion, inputs)
        y_TD = self.mlp.compute(self.post_attention_layernorm(x_BSD).flatten(0, 1), active)
        return x_BSD + y_TD.view_as(x_BSD), carry, [stats]
