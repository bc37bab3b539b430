"""ROUTERS: every router by name, as a function from sizes and options to one router per MoE layer.

Options are plain values (they live in config.json): fields of `ClassicRule`, and what a variant adds to them.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

from torch import nn

from ..contract.router import RouterSizes
from .classic.balanced import BaseRouter, SinkhornRouter
from .classic.classic import ClassicRouter
from .classic.cosine import CosineRouter
from .classic.device_balance import DeviceBalancedRouter
from .classic.expert_choice import ExpertChoiceRouter
from .classic.pathway import PathwayRouter
from .classic.random_choice import GShardRouter, SigmaRouter
from .classic.recurrent import RecurrentRouter
from .classic.rule import ClassicRule, expect_plain
from .own_rules.fixed import ForcedRouter, HashRouter
from .own_rules.pregate import PreGate
from .own_rules.relu import ReluRouter, SparsityControl
from .own_rules.soft import SoftRouter

Kind = Callable[..., ClassicRouter]


def classic(kind: Kind, sizes: RouterSizes, taken: Sequence[str] = (), /, **options: Any) -> list[nn.Module]:
    """Independent routers of one kind: options are the fields of `ClassicRule` and the kind's own keywords.

    `taken` names the options that the caller understands besides, for the message about an unknown one.
    """
    own_kinds = {
        name: parameter.annotation
        for name, parameter in inspect.signature(kind).parameters.items()
        if name not in _NOT_OPTIONS
    }
    _expect_options(options, [*taken, *own_kinds, *ClassicRule.__dataclass_fields__])
    own = {name: options.pop(name) for name in own_kinds if name in options}
    for name, value in own.items():
        expect_plain(name, value, own_kinds[name])
    rule = ClassicRule(**options)
    return [kind(sizes, layer, rule, **own) for layer in range(sizes.num_layers)]


def recurrent(sizes: RouterSizes, /, *, state_width: int = 128, **options: Any) -> list[nn.Module]:
    """RMoE: one GRU cell of width `state_width` for all layers; options as for `classic`, and `recurrence`."""
    if state_width < 1:
        raise ValueError(f"state_width must be at least 1; got {state_width}")
    cell = nn.GRUCell(state_width, state_width)
    return classic(partial(RecurrentRouter, cell=cell), sizes, ["state_width"], **options)


def moepp(sizes: RouterSizes, /, *, gating_residual: bool = True, **options: Any) -> list[nn.Module]:
    """MoE++: a gating residual between layers; without it the rule alone is left."""
    return classic(PathwayRouter if gating_residual else ClassicRouter, sizes, ["gating_residual"], **options)


def deepseek_v2(sizes: RouterSizes, /, **options: Any) -> list[nn.Module]:
    """Groups are devices with losses of their own; without groups the rule alone is left."""
    has_devices = options.get("num_groups", 1) != 1 or {"device_weight", "communication_weight"} & set(options)
    return classic(DeviceBalancedRouter if has_devices else ClassicRouter, sizes, **options)


def longcat(sizes: RouterSizes, /, *, target_load: float | None = None, **options: Any) -> list[nn.Module]:
    """Nulls steered by the bias; as published, two thirds of the K experts are FFN experts on average."""
    target_load = sizes.top_k * 2 / 3 if target_load is None else target_load
    return classic(ClassicRouter, sizes, target_load=target_load, **options)


def sinkhorn(sizes: RouterSizes, /, **options: Any) -> list[nn.Module]:
    """The gate is a sigmoid for K = 1, else a softmax."""
    options = {"score": "sigmoid" if sizes.top_k == 1 else "softmax"} | options
    return classic(SinkhornRouter, sizes, **options)


def remoe(sizes: RouterSizes, /, *, initial_penalty: float = 1e-8, penalty_growth: float = 1.2) -> list[nn.Module]:
    """ReLU routing; the penalty weight is common to all layers."""
    target_share = sizes.top_k / sizes.num_routable
    control = SparsityControl(sizes.num_layers, target_share, initial_penalty, penalty_growth)
    return [ReluRouter(sizes, layer, control) for layer in range(sizes.num_layers)]


def hashed(sizes: RouterSizes, /, *, seed: int = 0) -> list[nn.Module]:
    """A table from token id to experts per layer."""
    return [HashRouter(sizes, layer, seed) for layer in range(sizes.num_layers)]


def forced(sizes: RouterSizes, /, *, num_rows: int = 1, row_by: str = "position") -> list[nn.Module]:
    """Room for `num_rows` rows of a routing to replay."""
    return [ForcedRouter(sizes, layer, num_rows, row_by) for layer in range(sizes.num_layers)]


def soft_moe(sizes: RouterSizes, /, *, slots_per_expert: int = 8) -> list[nn.Module]:
    """Mixing weights between tokens and slots."""
    return [SoftRouter(sizes, layer, slots_per_expert) for layer in range(sizes.num_layers)]


def pregate(
    sizes: RouterSizes, /, *, ahead: int = 1, inner: str = "mixtral", inner_options: dict[str, Any] | None = None
) -> list[nn.Module]:
    """Each gate of the `inner` router is read `ahead` blocks before the block it decides for; 0 is `inner` itself.

    Raises:
        ValueError: if `ahead` leaves no block to plan for, or `inner` cannot be pre-gated.
    """
    if inner in NOT_PREGATED:
        raise ValueError(f"{inner} cannot be pre-gated: {NOT_PREGATED[inner]}")
    if not 0 <= ahead < sizes.num_layers:
        raise ValueError(f"ahead must lie in 0..{sizes.num_layers - 1} (MoE layers - 1); got {ahead}")
    gates = build_routers(inner, sizes, inner_options)
    return [PreGate(gates, layer, ahead) for layer in range(sizes.num_layers)] if ahead else gates


NOT_PREGATED = {
    "pregate": "its plan is already made ahead; raise `ahead` instead",
    "hash": "it reads token ids only, so every layer's experts are known from the start",
    "forced": "its routing is given beforehand",
    "soft_moe": "it runs every expert for every sequence, so there is nothing to fetch ahead",
    "expert_choice": "pre-gating serves decoding, which expert choice cannot do",
}

ROUTERS: dict[str, Callable[..., list[nn.Module]]] = {
    "classic": partial(classic, ClassicRouter),
    # Fedus et al. 2022, arXiv:2101.03961: raw softmax weight, capacity, jitter, small init; meant for K = 1
    "switch": partial(classic, ClassicRouter, capacity_factor=1.25, jitter=0.01, init="truncated", init_scale=0.1),
    # Lepikhin et al. 2020, arXiv:2006.16668: top-2 renormalised, random second expert, loss on first choices
    "gshard": partial(classic, GShardRouter, renormalise=True, capacity_factor=1.0, balance_loss="first_choice"),
    # Jiang et al. 2024, arXiv:2401.04088: softmax over the selected logits
    "mixtral": partial(classic, ClassicRouter, score="selected_softmax"),
    # Muennighoff et al. 2024, arXiv:2409.02060: softmax over all, no renormalisation, dropless
    "olmoe": partial(classic, ClassicRouter, score="softmax", init="truncated", init_cut=3.0),
    # Qwen team 2025, arXiv:2505.09388: softmax over all, renormalised
    "qwen3_moe": partial(classic, ClassicRouter, score="softmax", renormalise=True),
    # DeepSeek-AI 2024, arXiv:2405.04434: softmax scores, best-expert groups by option (8, keep 3), no renormalisation;
    # with groups, device and communication losses
    "deepseek_v2": partial(deepseek_v2, score="softmax", scale=16.0, group_score="max"),
    # DeepSeek-AI 2024, arXiv:2412.19437, and Ling 2.0, arXiv:2510.22115: sigmoid scores, balancing bias, renormalised,
    # groups by option (8, keep 4); a small loss per sequence beside the bias
    "deepseek_v3": partial(
        classic,
        ClassicRouter,
        score="sigmoid",
        renormalise=True,
        scale=2.5,
        bias_rate=1e-3,
        group_score="top2",
        balance_loss="sequence",
    ),
    # Wang et al. 2024, arXiv:2408.15664: the balancing bias alone
    "loss_free": partial(classic, ClassicRouter, score="sigmoid", bias_rate=1e-3, balance_loss="none"),
    # Zeng et al. 2024, arXiv:2406.13233: nulls (zero_compute "zero"), weights normalised over FFN experts only
    "adamoe": partial(
        classic, ClassicRouter, score="selected_softmax", normalise_over="ffn", balance_loss="null_averaged"
    ),
    # Meituan 2025, arXiv:2509.01322: nulls (zero_compute "copy") with raw weights, share steered by the bias
    "longcat": partial(longcat, score="softmax", bias_rate=0.1, balance_loss="none"),
    # Jin et al. 2024, arXiv:2410.07348: zero, copy and constant experts, gating residual, weighted loss and capacity
    "moepp": partial(moepp, score="selected_softmax", normalise_over="nonzero", ffn_share=0.75, capacity_factor=1.1),
    # Qiu et al. 2024, arXiv:2408.06793: a GRU across layers
    "rmoe": partial(recurrent, score="selected_softmax"),
    # Hwang et al. 2023, arXiv:2308.12066: gates read `ahead` blocks before
    "pregate": pregate,
    # Csordas et al. 2023, arXiv:2310.10837: sigmoid, expert dropout, entropy of the batch mean
    "sigma_moe": partial(classic, SigmaRouter, score="sigmoid", balance_loss="entropy"),
    # Chi et al. 2022, arXiv:2204.09179: cosine scores
    "xmoe": partial(classic, CosineRouter, score="softmax"),
    # Wang et al. 2024, arXiv:2412.14711: ReLU weights, adaptive L1
    "remoe": remoe,
    # Zhou et al. 2022, arXiv:2202.09368: experts pick tokens; cannot generate
    "expert_choice": partial(classic, ExpertChoiceRouter, score="softmax", balance_loss="none"),
    # Clark et al. 2022, arXiv:2202.01169: doubly normalised selection in training
    "sinkhorn": partial(sinkhorn, balance_loss="none"),
    # Lewis et al. 2021, arXiv:2103.16716: optimal balanced assignment in training, K = 1
    "base": partial(classic, BaseRouter, score="sigmoid", balance_loss="none"),
    # Roller et al. 2021, arXiv:2106.04426: a fixed table of token ids
    "hash": hashed,
    # Puigcerver et al. 2023, arXiv:2308.00951: slots read mixtures of tokens; cannot generate
    "soft_moe": soft_moe,
    # a given routing, replayed
    "forced": forced,
}

_NOT_OPTIONS = ("sizes", "layer", "rule", "score_width", "cell")


def build_routers(name: str, sizes: RouterSizes, options: dict[str, Any] | None = None) -> list[nn.Module]:
    """One router per MoE layer.

    Args:
        name: a key of `ROUTERS`.
        sizes: D, E, Z, K, L, V.
        options: keyword arguments that refine the named router.

    Raises:
        ValueError: if the name or an option is unknown, or sizes and options do not fit together.
    """
    expect_router(name)
    if not isinstance(options, Mapping | None):
        raise ValueError(f"router options must be names with values; got {options!r}")
    options, parameters = dict(options or {}), inspect.signature(ROUTERS[name]).parameters.values()
    own_kinds = {known.name: known.annotation for known in parameters if known.kind == known.KEYWORD_ONLY}
    if not any(known.kind == known.VAR_KEYWORD for known in parameters):
        _expect_options(options, list(own_kinds))
    for option in own_kinds.keys() & options.keys():
        expect_plain(option, options[option], own_kinds[option])
    return ROUTERS[name](sizes, **options)


def expect_router(name: str) -> None:
    """Raises ValueError, with the nearest name, if there is no such router."""
    if not isinstance(name, str) or name not in ROUTERS:
        near = get_close_matches(str(name), ROUTERS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown router {name!r}; {hint}known are {', '.join(ROUTERS)}")


def _expect_options(options: dict[str, Any], known: list[str]) -> None:
    if unknown := sorted(set(options) - set(known)):
        near = get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown router option {', '.join(unknown)}; {hint}known are {', '.join(known)}")
