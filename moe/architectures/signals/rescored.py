"""Routers of another kind under the rule of the configured router: top-k, weights and balance stay, scores change."""

from collections.abc import Callable

from torch import nn

from routing import ROUTERS, ClassicRouter, RouterRow, build_routers

from ...parts.config import MoEConfig


def rescored_routers(config: MoEConfig, kind: Callable[..., nn.Module]) -> list[nn.Module]:
    """One router of this kind per MoE layer, under the rule of `config.router` and its options.

    Raises:
        ValueError: if the configured router scores in a way of its own.
    """
    fitting = [name for name, row in ROUTERS.items() if _is_rule_alone(row)]
    if config.router not in fitting:
        raise ValueError(
            f"the architecture {config.architecture!r} scores experts itself, so the router must be one of "
            f"{', '.join(fitting)}; got {config.router!r}"
        )
    routers = build_routers(config.router, config.router_sizes, config.router_options)
    return [kind(router.sizes, router.layer, router.rule) for router in routers]


def _is_rule_alone(row: RouterRow) -> bool:
    """Whether a router of the catalogue is a `ClassicRouter` with options that do not depend on sizes."""
    return row.kind is ClassicRouter and row.sized_defaults is None and row.build is None
