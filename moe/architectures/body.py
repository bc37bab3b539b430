"""Body: what an architecture makes of a config."""

from dataclasses import dataclass, field

from torch import nn

from ..stack import Stack


@dataclass(frozen=True, kw_only=True, eq=False)
class Body:
    """The parts of a decoder that architectures differ in.

    Args:
        layers: the L routed layers, each a `moe.layer.RoutedLayer`.
        stack: in what order decoder layers run.
    """

    layers: list[nn.Module]
    stack: Stack = field(default_factory=Stack)
