"""Body: what an architecture makes of a config; Architecture: a row of `ARCHITECTURES`."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from ..layers.stack import Stack
from ..parts.config import MoEConfig


@dataclass(frozen=True, kw_only=True, eq=False)
class Body:
    """The parts of a decoder that architectures differ in.

    Args:
        layers: the L routed layers, each a `moe.RoutedLayer`.
        stack: in what order decoder layers run.
        decoder_layer: makes a decoder layer of the config, its place and what stands in its feed-forward place; None
            for the usual one.
    """

    layers: list[nn.Module]
    stack: Stack = field(default_factory=Stack)
    decoder_layer: Callable[[MoEConfig, int, nn.Module], nn.Module] | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the rest of the project needs to know of an architecture.

    Args:
        build: makes the body of a config; its keyword-only parameters are the options.
        source: paper, with its arXiv number; empty if there is none.
        option_groups: frozen dataclasses whose fields are the options, for a `build` that takes any.
        example: fields of a `MoEConfig` of 6 experts, 3 layers and width 32 that the contract tests build it with.
    """

    build: Callable[..., Body]
    source: str = ""
    option_groups: tuple[type, ...] = ()
    example: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, config: MoEConfig, **options: Any) -> Body:
        """The body of a config. Raises ValueError if sizes and options do not fit together."""
        return self.build(config, **options)

    @property
    def options(self) -> list[str]:
        """Names of all options."""
        if self.option_groups:
            return list(dict.fromkeys(option.name for group in self.option_groups for option in fields(group)))
        parameters = inspect.signature(self.build).parameters.values()
        return [parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY]


def expect_choices(config: MoEConfig) -> None:
    """Raises ValueError for a router that mixes tokens instead of choosing experts."""
    if config.router == "soft_moe":
        raise ValueError(f"the architecture {config.architecture!r} needs a router that chooses; got 'soft_moe'")
