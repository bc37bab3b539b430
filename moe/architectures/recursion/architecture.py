"""Mixture-of-Recursions: a block of layers that tokens pass as often as a depth router gives them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from routing import ROUTERS, Options, build_routers, read_options

from ...layers.layer import FeedForward, build_moe_layer
from ...parts.config import MoEConfig
from ..body import Body
from .options import CHOICES, read_depth_options
from .stack import KeySharing, RecursionStack


@dataclass(frozen=True, kw_only=True)
class RecursionOptions(Options):
    """What recurs, whoever chooses.

    Args:
        recursions: passes at most, at least 1.
        choice: `expert` (each recursion picks tokens), `token` (each token gets its depth at once), or `none` (all
            tokens pass all recursions); the options of each are those of `recursion.options.CHOICES`.
        keys: attention of later recursions sees the keys of the tokens alive in that `recursion`, or those of the
            `first`.
        feed_forward: `moe` for routed layers, `dense` for one feed-forward of width `intermediate_size` each.
        first, last: layers that do not recur.
    """

    recursions: int = 2
    choice: Literal["expert", "token", "none"] = "expert"
    keys: KeySharing = "recursion"
    feed_forward: Literal["moe", "dense"] = "moe"
    first: int = 1
    last: int = 1


def mixture_of_recursions(config: MoEConfig, **options: Any) -> Body:
    """The layers between the first and the last ones recur ("middle cycle"); one recursion is the plain stack.

    Args:
        config: sizes; `num_hidden_layers` counts layers that own weights.
        options: fields of `RecursionOptions`, and of the options of its choice.

    Raises:
        ValueError: if an option is unknown, belongs to another choice or is out of range, or the router cannot recur.
    """
    common = {name: options.pop(name) for name in RecursionOptions.__dataclass_fields__ if name in options}
    (own,) = read_options([RecursionOptions], common)
    depth_options = read_depth_options(own.choice, options)
    block = _block(config, own)
    layers = _layers(config, own.feed_forward)
    if own.recursions == 1:
        return Body(layers=layers)
    depth = depth_options.build(config.hidden_size, own.recursions)
    return Body(layers=layers, stack=RecursionStack(own.recursions, block, config.num_hidden_layers, depth, own.keys))


OPTIONS = (RecursionOptions, *CHOICES.values())


def _block(config: MoEConfig, options: RecursionOptions) -> range:
    if options.recursions < 1:
        raise ValueError(f"recursions must be at least 1; got {options.recursions}")
    first, last = options.first, options.last
    if first < 0 or last < 0 or first + last >= config.num_hidden_layers:
        raise ValueError(
            f"first and last must leave at least one of {config.num_hidden_layers} layers to recur; "
            f"got {first} and {last}"
        )
    return range(first, config.num_hidden_layers - last)


def _layers(config: MoEConfig, feed_forward: str) -> Sequence[nn.Module]:
    if feed_forward == "dense":
        sizes = (config.hidden_size, config.intermediate_size, config.hidden_act)
        return [FeedForward(*sizes) for _ in range(config.num_moe_layers)]
    if why := ROUTERS[config.router].refusals.get("mixture_of_recursions"):
        raise ValueError(f"the router {config.router!r} cannot recur: {why}")
    routers = build_routers(config.router, config.router_sizes, config.router_options)
    return [build_moe_layer(config, router) for router in routers]
