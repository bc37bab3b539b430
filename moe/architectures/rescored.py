"""Routers of another kind under the rule of the configured router: top-k, weights and balance stay, scores change."""

from collections.abc import Callable
from typing import Any

from torch import nn

from routing import ROUTERS

from ..config import MoEConfig


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
    options: dict[str, Any] = config.router_options or {}
    return ROUTERS[config.router](config.router_sizes, kind=kind, **options)


def _is_rule_alone(build: Callable[..., list[nn.Module]]) -> bool:
    classic = ROUTERS["classic"]
    return build is classic or (getattr(build, "func", None) is classic and "kind" not in build.keywords)  # type: ignore[attr-defined]
