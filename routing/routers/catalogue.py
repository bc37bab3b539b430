"""ROUTERS: every router by name, one row each; a router that stands here needs no other mention.

Options are plain values (they live in config.json): fields of a router's `option_groups`.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..contract.router import RouterSizes
from ..ground.expect import expect_name
from .classic.balanced import BaseRouter, SinkhornRouter
from .classic.classic import ClassicRouter
from .classic.cosine import CosineRouter
from .classic.device_balance import DeviceBalancedRouter
from .classic.expert_choice import ExpertChoiceRouter
from .classic.pathway import PathwayRouter
from .classic.random_choice import GShardRouter, SigmaRouter
from .classic.recurrent import RecurrentRouter
from .local.pool import PoolRouter
from .local.resident import ResidentRouter, resident_defaults
from .own_rules.fixed import ForcedRouter, HashRouter
from .own_rules.hashed_choice import HashedChoiceRouter
from .own_rules.pregate import PreGate, PreGateOptions
from .own_rules.prices import PricedRouter
from .own_rules.relu import ReluRouter
from .own_rules.soft import SoftRouter
from .own_rules.threshold import ThresholdRouter
from .row import Example, RouterRow

SEQUENCE_STATE = "it keeps a state per token and layer, and here a token passes a layer several times, or not at all"


def _pregated(sizes: RouterSizes, options: PreGateOptions) -> list[nn.Module]:
    """Raises ValueError if `ahead` leaves no block to plan for, or the inner router cannot be pre-gated."""
    expect_router(options.inner)
    if why := ROUTERS[options.inner].refusals.get("pregate"):
        raise ValueError(f"{options.inner} cannot be pre-gated: {why}")
    if not 0 <= options.ahead < sizes.num_layers:
        raise ValueError(f"ahead must lie in 0..{sizes.num_layers - 1} (MoE layers - 1); got {options.ahead}")
    gates = build_routers(options.inner, sizes, options.inner_options)
    return [PreGate(gates, layer, options.ahead) for layer in range(sizes.num_layers)] if options.ahead else gates


# numbers in the rows are the published defaults of each source
ROUTERS: dict[str, RouterRow] = {
    "classic": RouterRow(kind=ClassicRouter),
    # raw softmax weight, capacity, jitter, small start; meant for K = 1
    "switch": RouterRow(
        kind=ClassicRouter,
        source="Fedus et al. 2022, arXiv:2101.03961",
        defaults={"capacity_factor": 1.25, "jitter": 0.01, "init": "truncated", "init_scale": 0.1},
    ),
    # top-2 renormalised, random second expert, loss on first choices
    "gshard": RouterRow(
        kind=GShardRouter,
        source="Lepikhin et al. 2020, arXiv:2006.16668",
        defaults={"renormalise": True, "capacity_factor": 1.0, "balance_loss": "first_choice"},
    ),
    # softmax over the selected logits
    "mixtral": RouterRow(
        kind=ClassicRouter, source="Jiang et al. 2024, arXiv:2401.04088", defaults={"score": "selected_softmax"}
    ),
    # softmax over all, no renormalisation, dropless
    "olmoe": RouterRow(
        kind=ClassicRouter,
        source="Muennighoff et al. 2024, arXiv:2409.02060",
        defaults={"init": "truncated", "init_cut": 3.0},
    ),
    # softmax over all, renormalised
    "qwen3_moe": RouterRow(
        kind=ClassicRouter, source="Qwen team 2025, arXiv:2505.09388", defaults={"renormalise": True}
    ),
    # softmax scores, best-expert groups by option (8, keep 3), no renormalisation; with groups, device losses
    "deepseek_v2": RouterRow(
        kind=DeviceBalancedRouter,
        source="DeepSeek-AI 2024, arXiv:2405.04434",
        defaults={"scale": 16.0, "group_score": "max"},
        balance_weight=0.003,
    ),
    # sigmoid scores, balancing bias, renormalised, groups by option (8, keep 4), and a small loss per sequence
    "deepseek_v3": RouterRow(
        kind=ClassicRouter,
        source="DeepSeek-AI 2024, arXiv:2412.19437; Ling 2.0, arXiv:2510.22115",
        defaults={
            "score": "sigmoid",
            "renormalise": True,
            "scale": 2.5,
            "bias_rate": 1e-3,
            "group_score": "top2",
            "balance_loss": "sequence",
        },
        balance_weight=1e-4,
    ),
    # the balancing bias alone
    "loss_free": RouterRow(
        kind=ClassicRouter,
        source="Wang et al. 2024, arXiv:2408.15664",
        defaults={"score": "sigmoid", "bias_rate": 1e-3, "balance_loss": "none"},
    ),
    # nulls (zero_compute "zero"), weights normalised over FFN experts only
    "adamoe": RouterRow(
        kind=ClassicRouter,
        source="Zeng et al. 2024, arXiv:2406.13233",
        defaults={"score": "selected_softmax", "normalise_over": "ffn", "balance_loss": "null_averaged"},
        example=Example(top_k=3, zero_compute=("zero",) * 4),
    ),
    # nulls (zero_compute "copy") with raw weights; the bias steers two thirds of the K experts to be FFN experts
    "longcat": RouterRow(
        kind=ClassicRouter,
        source="Meituan 2025, arXiv:2509.01322",
        defaults={"bias_rate": 0.1, "balance_loss": "none"},
        sized_defaults=lambda sizes: {"target_load": sizes.top_k * 2 / 3},
        example=Example(top_k=3, zero_compute=("copy",) * 3),
    ),
    # zero, copy and constant experts, gating residual, weighted loss and capacity
    "moepp": RouterRow(
        kind=PathwayRouter,
        source="Jin et al. 2024, arXiv:2410.07348",
        defaults={
            "score": "selected_softmax",
            "normalise_over": "nonzero",
            "ffn_share": 0.75,
            "capacity_factor": 1.1,
        },
        example=Example(zero_compute=("zero", "copy", "constant", "zero")),
    ),
    # a GRU across layers
    "rmoe": RouterRow(
        kind=RecurrentRouter,
        source="Qiu et al. 2024, arXiv:2408.06793",
        defaults={"score": "selected_softmax"},
    ),
    # gates read `ahead` blocks before
    "pregate": RouterRow(
        kind=PreGate,
        source="Hwang et al. 2023, arXiv:2308.12066",
        build=_pregated,
        refusals={
            "pregate": "its plan is already made ahead; raise `ahead` instead",
            "mixture_of_recursions": "a plan belongs to one block, and here a block is passed several times",
        },
    ),
    # sigmoid, expert dropout, entropy of the batch mean
    "sigma_moe": RouterRow(
        kind=SigmaRouter,
        source="Csordas et al. 2023, arXiv:2310.10837",
        defaults={"score": "sigmoid", "balance_loss": "entropy"},
        balance_weight=1e-3,
    ),
    # cosine scores
    "xmoe": RouterRow(kind=CosineRouter, source="Chi et al. 2022, arXiv:2204.09179"),
    # ReLU weights, adaptive L1
    "remoe": RouterRow(kind=ReluRouter, source="Wang et al. 2024, arXiv:2412.14711"),
    # experts pick tokens; cannot generate
    "expert_choice": RouterRow(
        kind=ExpertChoiceRouter,
        source="Zhou et al. 2022, arXiv:2202.09368",
        defaults={"balance_loss": "none"},
        refusals={"pregate": "pre-gating serves decoding, which expert choice cannot do"},
    ),
    # doubly normalised selection in training; the gate is a sigmoid for K = 1, else a softmax
    "sinkhorn": RouterRow(
        kind=SinkhornRouter,
        source="Clark et al. 2022, arXiv:2202.01169",
        defaults={"balance_loss": "none"},
        sized_defaults=lambda sizes: {"score": "sigmoid" if sizes.top_k == 1 else "softmax"},
    ),
    # optimal balanced assignment in training, K = 1
    "base": RouterRow(
        kind=BaseRouter,
        source="Lewis et al. 2021, arXiv:2103.16716",
        defaults={"score": "sigmoid", "balance_loss": "none"},
        example=Example(top_k=1),
    ),
    # a fixed table of token ids
    "hash": RouterRow(
        kind=HashRouter,
        source="Roller et al. 2021, arXiv:2106.04426",
        refusals={"pregate": "it reads token ids only, so every layer's experts are known from the start"},
    ),
    # slots read mixtures of tokens; cannot generate
    "soft_moe": RouterRow(
        kind=SoftRouter,
        source="Puigcerver et al. 2023, arXiv:2308.00951",
        refusals={
            "pregate": "it runs every expert for every sequence, so there is nothing to fetch ahead",
            "mixture_of_recursions": "its slots mix the tokens of a row, and here only some of them come back",
        },
    ),
    # the first layers' experts by token id, weights by learned scores; sqrt-softplus scores and a bias elsewhere
    "deepseek_v4": RouterRow(
        kind=HashedChoiceRouter,
        source="DeepSeek-AI 2026 (DeepSeek-V4)",
        defaults={
            "score": "sqrt_softplus",
            "renormalise": True,
            "scale": 1.5,
            "bias_rate": 1e-3,
            "balance_loss": "sequence",
        },
        balance_weight=1e-4,
        refusals={"pregate": "its first layers read token ids only, and are known from the start"},
    ),
    # prices of experts from a linear programme balance each training batch
    "bip": RouterRow(
        kind=PricedRouter,
        source="Sun 2025, arXiv:2502.15451",
        defaults={"balance_loss": "none"},
    ),
    # the same with prices of either sign, which are quantiles
    "quantile": RouterRow(
        kind=PricedRouter,
        source="Su 2026, kexue.fm 11619",
        defaults={"prices": "quantile", "score": "sigmoid", "balance_loss": "none"},
    ),
    # an expert takes every token that scores above its threshold
    "threshold": RouterRow(kind=ThresholdRouter, source="Expert Threshold 2026, arXiv:2603.11535"),
    # a token chooses among a layer's resident experts and swaps at most one of them
    "resident": RouterRow(
        kind=ResidentRouter,
        source="github.com/ncylich/temporal-moe (2026)",
        sized_defaults=resident_defaults,
        refusals={"mixture_of_recursions": SEQUENCE_STATE},
        example=Example(options={"residents": 3}),
    ),
    # in training all tokens of a document choose from one pool of experts
    "pool": RouterRow(
        kind=PoolRouter,
        source="AI2 2026 (EMO), arXiv:2605.06663",
        defaults={"balance_loss": "global_batch"},
        refusals={"mixture_of_recursions": SEQUENCE_STATE},
        balance_weight=0.1,
        example=Example(options={"smallest": 3, "pool": 4}),
    ),
    # a given routing, replayed
    "forced": RouterRow(
        kind=ForcedRouter,
        refusals={"pregate": "its routing is given beforehand"},
        example=Example(options={"num_rows": 64}),
    ),
}


def build_routers(name: str, sizes: RouterSizes, options: dict[str, Any] | None = None) -> list[nn.Module]:
    """One router per MoE layer.

    Args:
        name: a key of `ROUTERS`.
        sizes: D, E, Z, K, L, V.
        options: refine the named router; fields of its class's `option_groups`.

    Raises:
        ValueError: if the name or an option is unknown, or sizes and options do not fit together.
    """
    expect_router(name)
    if not isinstance(options, Mapping | None):
        raise ValueError(f"router options must be names with values; got {options!r}")
    return ROUTERS[name](sizes, **(options or {}))


def expect_router(name: str) -> None:
    """Raises ValueError, with the nearest name, if there is no such router."""
    expect_name(name, ROUTERS, "router")
