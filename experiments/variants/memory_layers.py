"""Variants of `expertier compare` with memory layers, other signals, groups of features, at equal operations."""

from collections.abc import Callable
from math import isqrt
from typing import Any

Settings = dict[str, Any]
PEER_HEADS = 8  # as published
LOWER_CASE = ord("a")  # bytes from here on are the second modality


def _sizes(model: Settings) -> tuple[int, int, int, int]:
    """D, E, K, F."""
    names = ("hidden_size", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    defaults = (256, 16, 2, 256)
    D, E, K, F = (model.get(name, default) for name, default in zip(names, defaults, strict=True))
    return D, E, K, F


def _peer(model: Settings) -> Settings:
    """As many parameters in neurons as in the preset's experts, and as many of them as its operations pay for."""
    D, E, K, F = _sizes(model)
    num_rows, key_width = isqrt(3 * E * F // 2), max(2, D // 3 // 2 * 2)
    fixed = 2 * D * key_width + 2 * num_rows * key_width
    neurons = (6 * K * D * F / PEER_HEADS - fixed) / (4 * D)
    return {
        "architecture": "peer",
        "architecture_options": {"num_heads": PEER_HEADS, "key_width": key_width},
        "num_experts": num_rows**2,
        "num_experts_per_tok": max(1, min(num_rows, int(neurons))),
    }


def _ultramem(model: Settings) -> Settings:
    """Half of the operations in a plain feed-forward network, the rest and the other parameters in a memory."""
    D, E, K, F = _sizes(model)
    ffn_width = K * F // 2
    num_rows = isqrt(2 * 3 * (E * F - ffn_width)) // 2 * 2
    key_width, pre_width = max(2, D // 6 * 2), D // 4
    fixed = 2 * D * D + 4 * D * key_width + 4 * num_rows * key_width
    reads = (6 * D * (K * F - ffn_width) - fixed) / (2 * D)
    return {
        "architecture": "ultramem",
        "architecture_options": {"key_width": key_width, "pre_value_width": pre_width, "value_width": D - pre_width},
        "num_experts": num_rows**2,
        "num_experts_per_tok": max(1, min(num_rows // 2, int(reads))),
        "num_shared_experts": 1,
        "moe_intermediate_size": ffn_width,
    }


def _feature_groups(model: Settings) -> Settings:
    """About half of the features active in a wider feed-forward network."""
    D, E, K, F = _sizes(model)
    group_width = 3 * D // 4 // E
    if group_width < 1:
        raise ValueError(f"feature groups need at least one feature per expert; got {D} features and {E} experts")
    shared_width, chosen = D - E * group_width, max(1, E // 2)
    active = shared_width + chosen * group_width
    return {
        "architecture": "feature_groups",
        "architecture_options": {"shared_width": shared_width},
        "router": "mixtral",
        "num_experts_per_tok": chosen,
        "intermediate_size": max(1, (K * F + model.get("num_shared_experts", 0) * F) * D // active),
        "num_shared_experts": 0,
    }


def _by_letter_case(model: Settings) -> Settings:
    """Mixture-of-Transformers on bytes: those from `a` on, and the others, as two modalities."""
    _, _, K, F = _sizes(model)
    return {
        "architecture": "mixture_of_transformers",
        "architecture_options": {"first_ids": [0, LOWER_CASE]},
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": K * F,
    }


def _mode(model: Settings) -> Settings:
    """A router over token and (absent) condition, narrow enough to cost little beside the experts."""
    inner_width = max(1, _sizes(model)[0] // 8)
    return _named("mode", "qwen3_moe", reads="token_and_condition", inner_width=inner_width)(model)


def _named(architecture: str, router: str, **options: Any) -> Callable[[Settings], Settings]:
    return lambda model: {"architecture": architecture, "architecture_options": options, "router": router}


# Hydra's chunk of 16 tokens is the architecture's default
MEMORY_VARIANTS: dict[str, Callable[[Settings], Settings]] = {
    "peer": _peer,
    "ultramem": _ultramem,
    "hydra-16": _named("hydra", "mixtral", chunk=16),
    "hydra-prefix": _named("hydra", "mixtral", pooling="prefix"),
    "mode-tokens": _mode,
    "glider": _named("glider", "qwen3_moe"),
    "feature-groups": _feature_groups,
    "modalities": _by_letter_case,
}
