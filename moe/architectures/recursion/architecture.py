"""Mixture-of-Recursions: a block of layers that tokens pass as often as a depth router gives them."""

from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn

from routing import build_routers

from ...layers.layer import FeedForward, build_moe_layer
from ...parts.config import MoEConfig
from ..body import Body
from .depth import ExpertChoiceDepth, RouterKind, TokenChoiceDepth
from .stack import KeySharing, RecursionStack

Choice = Literal["expert", "token", "none"]
NOT_RECURSIVE = {
    "pregate": "a plan belongs to one block, and here a block is passed several times",
    "soft_moe": "its slots mix the tokens of a row, and here only some of them come back",
}


def mixture_of_recursions(
    config: MoEConfig,
    *,
    recursions: int = 2,
    choice: Choice = "expert",
    router: RouterKind | None = None,
    keys: KeySharing = "recursion",
    feed_forward: Literal["moe", "dense"] = "moe",
    first: int = 1,
    last: int = 1,
    inference: Literal["threshold", "top_k"] = "threshold",
    predictor: Literal["own", "separate"] = "own",
    score: Literal["softmax", "sigmoid"] = "softmax",
    balance: Literal["loss", "bias"] = "loss",
    alpha: float | None = None,
    loss_weight: float | None = None,
    z_weight: float | None = None,
) -> Body:
    """The layers between the `first` and the `last` ones recur ("middle cycle"); one recursion is the plain stack.

    Args:
        config: sizes; `num_hidden_layers` counts layers that own weights.
        recursions: passes at most.
        choice: `expert` (each recursion picks tokens), `token` (each token gets its depth at once), or `none` (all
            tokens pass all recursions).
        router: of the depth: `linear` (the best published one for expert choice) or `mlp` (for token choice).
        keys: attention of later recursions sees the keys of the tokens alive in that `recursion`, or those of the
            `first`.
        feed_forward: `moe` for routed layers, `dense` for one feed-forward of width `intermediate_size` each.
        first, last: layers that do not recur.
        inference: expert choice outside training: `threshold` is causal; `top_k` sees the whole row, so it cannot
            generate.
        predictor: whose logit the threshold reads: the router's `own`, or that of a `separate` one.
        score: token choice: what scores depths.
        balance: token choice: how depths are balanced.
        alpha: scale of the gate; 0.1 with a sigmoid, 1 with a softmax, without it.
        loss_weight: of the depth router's loss; 1e-3 in expert choice and 0.1 in token choice without it.
        z_weight: of the depth router's z-loss; 0 in expert choice and 1e-5 in token choice without it.

    Raises:
        ValueError: if an option is unknown or out of range, or the expert router cannot recur.
    """
    _expect_known("choice", choice, get_args(Choice))
    _expect_known("router", router or "linear", get_args(RouterKind))
    _expect_known("keys", keys, get_args(KeySharing))
    _expect_known("feed_forward", feed_forward, ("moe", "dense"))
    _expect_known("inference", inference, ("threshold", "top_k"))
    _expect_known("predictor", predictor, ("own", "separate"))
    _expect_known("score", score, ("softmax", "sigmoid"))
    _expect_known("balance", balance, ("loss", "bias"))
    block = _block(config, recursions, first, last)
    layers = _layers(config, feed_forward)
    if recursions == 1:
        return Body(layers=layers)
    weights = {"alpha": alpha, "loss_weight": loss_weight, "z_weight": z_weight}
    given = {name: value for name, value in weights.items() if value is not None}
    depth: ExpertChoiceDepth | TokenChoiceDepth | None = None
    if choice == "expert":
        own = {"kind": router or "linear", "inference": inference, "predictor": predictor}
        depth = ExpertChoiceDepth(config.hidden_size, recursions, **(own | given))
    elif choice == "token":
        own = {"kind": router or "mlp", "score": score, "balance": balance}
        own["alpha"] = 1.0 if score == "softmax" else 0.1
        depth = TokenChoiceDepth(config.hidden_size, recursions, **(own | given))
    return Body(layers=layers, stack=RecursionStack(recursions, block, config.num_hidden_layers, depth, keys))


def _expect_known(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}; got {value!r}")


def _block(config: MoEConfig, recursions: int, first: int, last: int) -> range:
    if recursions < 1:
        raise ValueError(f"recursions must be at least 1; got {recursions}")
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
    if config.router in NOT_RECURSIVE:
        raise ValueError(f"the router {config.router!r} cannot recur: {NOT_RECURSIVE[config.router]}")
    routers = build_routers(config.router, config.router_sizes, config.router_options)
    return [build_moe_layer(config, router) for router in routers]
