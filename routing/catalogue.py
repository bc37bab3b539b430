"""ROUTERS: every router by name, as a function from sizes and options to one router per MoE layer."""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import nn

from .classic import ClassicRouter
from .router import RouterSizes
from .rule import parse_rule


def classic(sizes: RouterSizes, **rule: Any) -> list[ClassicRouter]:
    """Independent routers with one rule; the keyword arguments are those of `ClassicRule`."""
    parsed = parse_rule(rule)
    return [ClassicRouter(sizes, layer, parsed) for layer in range(sizes.num_layers)]


ROUTERS: dict[str, Callable[..., list[Any]]] = {
    "classic": classic,
    # Fedus et al. 2022, arXiv:2101.03961: raw softmax weight, capacity, jitter; meant for top_k = 1
    "switch": partial(classic, score="softmax", capacity_factor=1.25, capacity_policy="first", jitter=0.01),
    # Jiang et al. 2024, arXiv:2401.04088: softmax over the selected logits
    "mixtral": partial(classic, score="selected_softmax"),
    # Muennighoff et al. 2024, arXiv:2409.02060: softmax over all, no renormalisation, dropless
    "olmoe": partial(classic, score="softmax"),
    # Qwen team 2025, arXiv:2505.09388: softmax over all, renormalised
    "qwen3_moe": partial(classic, score="softmax", renormalise=True),
    # DeepSeek-AI 2024, arXiv:2405.04434: softmax scores, best-expert groups by option (8, keep 3), no renormalisation
    "deepseek_v2": partial(classic, score="softmax", scale=16.0, group_score="max"),
    # DeepSeek-AI 2024, arXiv:2412.19437: sigmoid scores, balancing bias, renormalised; groups by option
    "deepseek_v3": partial(classic, score="sigmoid", renormalise=True, scale=2.5, bias_rate=1e-3, group_score="top2"),
}


def build_routers(name: str, sizes: RouterSizes, options: dict[str, Any] | None = None) -> list[nn.Module]:
    """One router per MoE layer.

    Args:
        name: a key of `ROUTERS`.
        sizes: D, E, Z, K, L.
        options: keyword arguments that refine the named router.

    Raises:
        ValueError: if the name or an option is unknown, or sizes and options do not fit together.
    """
    expect_router(name)
    return ROUTERS[name](sizes, **(options or {}))


def expect_router(name: str) -> None:
    """Raises ValueError, with the nearest name, if there is no such router."""
    if name not in ROUTERS:
        near = get_close_matches(name, ROUTERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown router {name!r}; {hint}known are {', '.join(ROUTERS)}")
