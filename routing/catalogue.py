"""ROUTERS: every router by name, as a function from sizes and options to one router per MoE layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .classic import ClassicRouter, ClassicRule
from .router import RouterSizes


def classic(sizes: RouterSizes, **rule: Any) -> list[ClassicRouter]:
    """Independent routers with one rule; the keyword arguments are those of `ClassicRule`."""
    try:
        parsed = ClassicRule(**rule)
    except TypeError as error:
        raise ValueError(f"router option: {error}; known are {', '.join(ClassicRule.__dataclass_fields__)}") from error
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
    if name not in ROUTERS:
        raise ValueError(f"unknown router {name!r}; known are {', '.join(ROUTERS)}")
    return ROUTERS[name](sizes, **(options or {}))
