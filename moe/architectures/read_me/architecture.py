"""Read-ME: one causal router over token ids for all layers, and in every layer a permanent part beside the experts."""

from collections.abc import Sequence

from torch import Tensor

from routing import Carry, RouterStats, RoutingContext

from ...experts.bank import Experts
from ...layers.layer import FeedForward, RoutedLayer
from ...parts.config import MoEConfig
from ...parts.flops import LayerFlops, projection_flops
from ..body import Body
from .token_router import SharedRouter, TokenRouter


class ReadMeLayer(RoutedLayer):
    """Experts of this layer's own width, and a permanent feed-forward that every token visits.

    Args:
        router: this layer's view of the common router.
        expert_width, permanent_width: of this layer; 0 means no permanent part.
    """

    def __init__(self, config: MoEConfig, router: SharedRouter, expert_width: int, permanent_width: int) -> None:
        super().__init__()
        self.router = router
        self.experts = Experts(config, expert_width)
        self.experts._is_expert_parallel = True  # ids may reach E (padding)
        has_permanent = permanent_width > 0
        self.permanent = FeedForward(config.hidden_size, permanent_width, config.hidden_act) if has_permanent else None

    @property
    def routers(self) -> list[SharedRouter]:
        return [self.router]

    def flops(self, loads: Sequence[Tensor], passes: float) -> LayerFlops:
        load_E = sum(loads)
        return LayerFlops(experts=self.experts.flops(load_E), shared=passes * projection_flops(self.permanent))

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, list[RouterStats]]:
        routing, carry, stats = self.router(x_TD, carry, context)
        y_TD = self.experts(x_TD, *routing.ffn_view())
        if self.permanent is not None:
            y_TD = y_TD + self.permanent(x_TD)
        return y_TD, carry, [stats]


def readme(
    config: MoEConfig,
    *,
    router_width: int | None = None,
    router_heads: int = 4,
    router_layers: int = 1,
    router_ffn: int | None = None,
    weigh: str = "one",
    expert_widths: Sequence[int] | None = None,
    permanent_widths: Sequence[int] | None = None,
) -> Body:
    """One router for all layers; widths may differ from layer to layer, as slicing a dense model leaves them.

    Args:
        config: `num_experts`, `num_experts_per_tok` (1 as published); `router` is not used.
        router_width, router_heads, router_layers, router_ffn: sizes of the router; by default an eighth of D (512 of
            4096 as published), and a feed-forward as wide.
        weigh: `one` or `probability`, see SharedRouter.
        expert_widths, permanent_widths: per MoE layer; by default F, and F for each shared expert.

    Raises:
        ValueError: if sizes do not fit.

    Source: Cai et al. 2024 (Read-ME), arXiv:2410.19123, eqs. 2 and 4.
    """
    unit = 2 * router_heads
    width = -(-config.hidden_size // (8 * unit)) * unit if router_width is None else router_width
    if min(width, router_heads, router_layers) < 1 or width % unit:
        raise ValueError(
            f"router_width must be a positive multiple of twice router_heads ({unit}); got {width} "
            f"with {router_layers} layers"
        )
    sizes = MoEConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        intermediate_size=router_ffn or width,
        num_hidden_layers=router_layers,
        num_attention_heads=router_heads,
        num_key_value_heads=router_heads,
        head_dim=width // router_heads,
        qk_norm="none",
        rope_theta=config.rope_theta,
        rms_norm_eps=config.rms_norm_eps,
        hidden_act=config.hidden_act,
    )
    core = TokenRouter(config, sizes)
    F = config.moe_intermediate_size
    experts = _widths("expert_widths", expert_widths, config, F, least=1)
    permanent = _widths("permanent_widths", permanent_widths, config, F * config.num_shared_experts, least=0)
    routers = [SharedRouter(config.router_sizes, layer, core, weigh) for layer in range(config.num_moe_layers)]
    return Body(layers=[ReadMeLayer(config, *parts) for parts in zip(routers, experts, permanent, strict=True)])


def _widths(name: str, given: Sequence[int] | None, config: MoEConfig, otherwise: int, least: int) -> list[int]:
    widths = [otherwise] * config.num_moe_layers if given is None else list(given)
    if len(widths) != config.num_moe_layers or min(widths) < least:
        raise ValueError(
            f"{name} must be {config.num_moe_layers} numbers, one per MoE layer, of at least {least}; got {widths}"
        )
    return widths
