"""Chain-of-Experts: tokens pass a layer's one bank of experts several times and are routed again each time.

Shapes: T tokens, D model width.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

from torch import Tensor, nn

from routing import Carry, RouterStats, RoutingContext, build_routers

from ..layers.layer import ExpertBank
from ..parts.config import MoEConfig
from ..parts.flops import LayerFlops
from .body import Body

Residual = Literal["stream", "normed"]
NOT_CHAINED = {
    "soft_moe": "its slots mix tokens before the experts, so there is no token to hand to the next iteration"
}
NOT_SHARED = {"pregate": "each of its gates decides for one call, and a shared gate is called in every iteration"}
NOT_SHARED |= dict.fromkeys(
    ("resident", "pool"), "it keeps one state per token, and a shared gate would advance it twice"
)


class ChainLayer(ExpertBank):
    """C iterations over one bank of experts.

    `x(t) = x(t-1) + experts(x(t-1)) + shared(x(t-1))`, where `x(0)` is the normed input; there is no norm between
    iterations. `stream` adds `x(C) - x(0)`, the sum of what the iterations computed, to the residual stream, so that
    C = 1 is the ordinary layer; `normed` replaces the stream by `x(C)`.

    Args:
        config: the model's config; K is per iteration.
        gates: C routers, or one for all iterations.
        iterations: how often tokens pass the layer's experts, at least 1.
        residual: what each iteration adds to: the residual `stream`, or its `normed` copy.

    Source: Wang et al. 2025 (Chain-of-Experts), arXiv:2506.18945, eqs. 3-6; `normed` is what the official code runs.
    """

    def __init__(self, config: MoEConfig, gates: Sequence[nn.Module], iterations: int, residual: Residual) -> None:
        super().__init__(config)
        self.gates = nn.ModuleList(gates)
        self.iterations = iterations
        self.adds_to_stream = residual == "stream"

    @property
    def routers(self) -> list[nn.Module]:
        return list(self.gates)

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry, list[RouterStats]]:
        stats: list[RouterStats] = []
        increments: list[Tensor] = []
        for iteration in range(self.iterations):
            if increments:
                x_TD = x_TD + increments[-1]
            gate = self.gates[iteration % len(self.gates)]
            routing, carry, call = gate(x_TD, carry, context)
            increments.append(self.compute(x_TD, routing))
            stats.append(call)
        y_TD = sum(increments[1:], start=increments[0]) if self.adds_to_stream else x_TD + increments[-1]
        return y_TD, carry, stats if len(self.gates) > 1 else [RouterStats.joined(stats)]

    def flops(self, loads: Sequence[Tensor], passes: float) -> LayerFlops:
        return super().flops(loads, passes * self.iterations)


def chain_of_experts(
    config: MoEConfig, *, iterations: int = 2, residual: Residual = "stream", shared_gate: bool = False
) -> Body:
    """Every routed layer is a chain.

    Args:
        config: sizes and router; `num_experts_per_tok` counts per iteration, so a chain of K / C costs what K do.
        iterations: how often tokens pass the layer's experts, at least 1.
        residual: `stream` is the ordinary pre-norm residual; `normed`, the published one, replaces the stream.
        shared_gate: one router for all iterations instead of one each.

    Raises:
        ValueError: if an option is out of range, or the router cannot be chained.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1; got {iterations}")
    if residual not in get_args(Residual):
        raise ValueError(f"residual must be one of {', '.join(get_args(Residual))}; got {residual!r}")
    refused = NOT_CHAINED | (NOT_SHARED if shared_gate and iterations > 1 else {})
    if config.router in refused:
        raise ValueError(f"the router {config.router!r} cannot be in this chain: {refused[config.router]}")
    num_gates = 1 if shared_gate else iterations
    sizes = replace(config.router_sizes, num_layers=config.num_moe_layers * num_gates)
    routers = build_routers(config.router, sizes, config.router_options)
    gates = [routers[first : first + num_gates] for first in range(0, len(routers), num_gates)]
    return Body(layers=[ChainLayer(config, own, iterations, residual) for own in gates])
