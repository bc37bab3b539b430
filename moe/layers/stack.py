"""Stack: in what order a forward pass runs the decoder layers; architectures that recur or skip have their own.

Shapes: B batch, S positions, T = B * S tokens, D model width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from routing import Carry, RouterStats, RoutingContext

from ..parts.attention import BorrowedKeys, KeyValues


@dataclass(frozen=True, kw_only=True, eq=False)
class StackInputs:
    """What every decoder layer of a forward pass sees besides the residual stream.

    Args:
        angles: cosine and sine of the rotary positions.
        mask: attention mask, or None for plain causal attention.
        cache: the key/value cache, keys and values of an earlier pass, or None.
        context: what routers may look at.
    """

    angles: tuple[Tensor, Tensor]
    mask: Tensor | None
    cache: KeyValues | BorrowedKeys | None
    context: RoutingContext


@dataclass(frozen=True, kw_only=True)
class LayerPasses:
    """How often a token of the text passes a decoder layer on average; for counting operations.

    Args:
        tokens: passes as a query and through the feed-forward.
        keys: passes that compute keys and values.
        visible: positions attended to, summed over passes, in units of what one full causal pass attends to.
    """

    tokens: float = 1.0
    keys: float = 1.0
    visible: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class StackOutput:
    """What a stack returns.

    Args:
        x_BSD: the residual stream after the last layer.
        router_stats: one per call of an expert router, in order.
        losses: further training losses by name, already weighted.
        passes: per decoder layer, how often tokens passed it; None when all passed all layers once.
    """

    x_BSD: Tensor
    router_stats: list[RouterStats] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)
    passes: list[LayerPasses] | None = None


class Stack(nn.Module):
    """Runs every decoder layer once, first to last.

    `is_causal` says whether, outside training, a token's result depends on earlier tokens only; `flops` what the
    stack's own modules cost a token.
    """

    is_causal = True
    flops = 0.0

    def forward(self, layers: Sequence[nn.Module], x_BSD: Tensor, carry: Carry, inputs: StackInputs) -> StackOutput:
        stats: list[RouterStats] = []
        for layer in layers:
            x_BSD, carry, layer_stats = layer(x_BSD, carry, inputs)
            stats.extend(layer_stats)
        return StackOutput(x_BSD=x_BSD, router_stats=stats)

    def post_step(self) -> None:
        """After an optimiser step; the plain stack has nothing to update."""
