"""Body: what an architecture makes of a config."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from ..layers.stack import Stack
from ..parts.config import MoEConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Body:
    """The parts of a decoder that architectures differ in.

    Args:
        layers: the L routed layers, each a `moe.layer.RoutedLayer`.
        stack: in what order decoder layers run.
        decoder_layer: makes a decoder layer of the config, its place and what stands in its feed-forward place; None
            for the usual one.
    """

    layers: list[nn.Module]
    stack: Stack = field(default_factory=Stack)
    decoder_layer: Callable[[MoEConfig, int, nn.Module], nn.Module] | None = None
