"""LayerFlops: what the parts of a routed layer cost one token, so that every architecture can say its own operations.

A multiply and an add are two operations. Norms, softmaxes and activations are left out.

Shapes: R routable experts.
"""

from dataclasses import dataclass

from torch import nn

# gate, up and down
SWIGLU_PRODUCTS = 3


@dataclass(frozen=True, kw_only=True)
class LayerFlops:
    """Operations of one layer per token of the text.

    Args:
        experts: FFN experts that a token visits on average.
        shared: shared experts, which every token visits each time it passes.
        zero_compute: copy and constant experts.
        attention: on top of a whole attention; negative where a layer's attention leaves something out.
    """

    experts: float = 0.0
    shared: float = 0.0
    zero_compute: float = 0.0
    attention: float = 0.0


def feed_forward_flops(width: int, inner_width: int) -> float:
    """Operations of a gated feed-forward network on one token."""
    return 2.0 * SWIGLU_PRODUCTS * width * inner_width


def projection_flops(module: nn.Module | None) -> float:
    """Two per entry of every matrix: what one token costs in a module of linear maps."""
    if module is None:
        return 0.0
    return 2.0 * sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)
