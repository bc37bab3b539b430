"""Stack: in what order a forward pass runs the decoder layers; architectures that recur or skip have their own.

Shapes: B batch, S positions, T = B * S tokens, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers import Cache

from routing import Carry, RouterStats, RoutingContext


@dataclass(frozen=True, kw_only=True, eq=False)
class StackInputs:
    """What every decoder layer of a forward pass sees besides the residual stream.

    Args:
        angles: cosine and sine of the rotary positions.
        mask: attention mask, or None for plain causal attention.
        cache: the key/value cache, or None.
        context: what routers may look at.
    """

    angles: tuple[Tensor, Tensor]
    mask: Tensor | None
    cache: Cache | None
    context: RoutingContext


@dataclass(frozen=True, kw_only=True, eq=False)
class StackOutput:
    """What a stack returns.

    Args:
        x_BSD: the residual stream after the last layer.
        router_stats: one per call of an expert router, in order.
        losses: further training losses by name, already weighted.
    """

    x_BSD: Tensor
    router_stats: list[RouterStats] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)


class Stack(nn.Module):
    """Runs every decoder layer once, first to last.

    `is_causal` says whether, outside training, a token's result depends on earlier tokens only.
    """

    is_causal = True

    def forward(self, layers: Sequence[nn.Module], x_BSD: Tensor, carry: Carry, inputs: StackInputs) -> StackOutput:
        stats: list[RouterStats] = []
        for layer in layers:
            x_BSD, carry, layer_stats = layer(x_BSD, carry, inputs)
            stats.extend(layer_stats)
        return StackOutput(x_BSD=x_BSD, router_stats=stats)
