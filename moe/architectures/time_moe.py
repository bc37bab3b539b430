"""Time-MoE: sparse experts, and a shared one behind a sigmoid gate; `moe.Forecaster` puts series in and forecasts out.

y = sum over the K chosen experts of s_i FFN_i(x) + sigmoid(w . x) FFN_shared(x), s the raw softmax over all experts.

Source: Shi et al. 2024 (Time-MoE), arXiv:2409.16040, section 3.

Shapes: T tokens, D model width.
"""

from torch import Tensor, nn

from routing import build_routers

from ..layers.layer import MoELayer
from ..parts.config import MoEConfig
from .body import Body


def time_moe(config: MoEConfig) -> Body:
    """A mixture-of-experts layer per router, with `num_shared_experts` behind a gate; as published, router `olmoe`.

    Raises:
        ValueError: if there is no shared expert to gate, or the router mixes tokens.
    """
    if not config.num_shared_experts:
        raise ValueError("time_moe gates its shared expert: num_shared_experts must be at least 1; got 0")
    routers = build_routers(config.router, config.router_sizes, config.router_options)
    if config.router == "soft_moe":
        raise ValueError("time_moe needs a router of tokens to experts; got 'soft_moe'")
    layers = [MoELayer(config, router) for router in routers]
    for layer in layers:
        layer.shared = GatedFeedForward(layer.shared, config.hidden_size)
    return Body(layers=layers)


class GatedFeedForward(nn.Module):
    """A feed-forward network times a sigmoid of the token.

    Args:
        network: of width D in and out.
        width: D, of the gate's input.
    """

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.network, self.gate = network, nn.Linear(width, 1, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.gate(x_TD).sigmoid() * self.network(x_TD)
