"""Routers of another kind under the rule of the configured router: top-k, weights and balance stay, scores change."""

from collections.abc import Callable
from functools import partial

from torch import nn

from routing import ROUTERS, ClassicRouter

from ..parts.config import MoEConfig


def rescored_routers(config: MoEConfig, kind: Callable[..., nn.Module]) -> list[nn.Module]:
    """One router of this kind per MoE layer, under the rule of `config.router` and its options.

    Raises:
        ValueError: if the configured router scores in a way of its own.
    """
    fitting = [name for name, build in ROUTERS.items() if _is_rule_alone(build)]
    if config.router not in fitting:
        raise ValueError(
            f"the architecture {config.architecture!r} scores experts itself, so the router must be one of "
            f"{', '.join(fitting)}; got {config.router!r}"
        )
    rule: partial[list[nn.Module]] = ROUTERS[config.router]  # type: ignore[assignment]
    return rule.func(kind, config.router_sizes, **rule.keywords | (config.router_options or {}))


def _is_rule_alone(build: Callable[..., list[nn.Module]]) -> bool:
    """Whether a router of the catalogue is a `ClassicRouter` with options and nothing else."""
    return isinstance(build, partial) and build.args == (ClassicRouter,)
