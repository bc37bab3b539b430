"""ARCHITECTURE_VARIANTS: what `expertier compare` compares beyond routers, made from a preset's sizes."""

from collections.abc import Callable
from typing import Any

from .memory_layers import MEMORY_VARIANTS

Settings = dict[str, Any]


def _chain(iterations: int, *, depth: int = 1, **options: Any) -> Callable[[Settings], Settings]:
    """Chain-of-Experts with K / C experts per iteration, and `depth` times the layers; raw softmax weights and the
    sequence-wise balance loss, as published.
    """

    def build(model: Settings) -> Settings:
        top_k = model.get("num_experts_per_tok", 2)
        if top_k % iterations:
            raise ValueError(f"a chain of {iterations} iterations must divide the preset's {top_k} experts per token")
        return {
            "architecture": "chain_of_experts",
            "architecture_options": {"iterations": iterations, **options},
            "router": "olmoe",
            "router_options": {"balance_loss": "sequence"},
            "num_experts_per_tok": top_k // iterations,
            "num_hidden_layers": model["num_hidden_layers"] * depth,
        }

    return build


def _recursions(recursions: int, feed_forward: str = "dense", **options: Any) -> Callable[[Settings], Settings]:
    """Mixture-of-Recursions as deep as the preset when unrolled; dense ones as wide as the preset's active experts."""

    def build(model: Settings) -> Settings:
        middle = model["num_hidden_layers"] - 2
        if middle < recursions or middle % recursions:
            raise ValueError(
                f"{recursions} recursions must divide the {middle} layers between the preset's first and last"
            )
        return {
            "architecture": "mixture_of_recursions",
            "architecture_options": {"recursions": recursions, "feed_forward": feed_forward, **options},
            "num_hidden_layers": 2 + middle // recursions,
            "intermediate_size": model["moe_intermediate_size"] * model.get("num_experts_per_tok", 2),
        }

    return build


def _latent(group: int, rank_share: float) -> Callable[[Settings], Settings]:
    """Latent experts, wider by what their narrow projections save, so that a token costs what the preset's does."""

    def build(model: Settings) -> Settings:
        D, F, top_k = model["hidden_size"], model["moe_intermediate_size"], model.get("num_experts_per_tok", 2)
        rank = max(1, round(rank_share * D))
        visited = min(top_k, -(-model.get("num_experts", 16) // group))
        width = (6 * D * F * top_k - visited * 4 * rank * D) / (top_k * (4 * rank + 2 * D))
        return {
            "architecture": "latent",
            "architecture_options": {"group": group, "rank": rank},
            "moe_intermediate_size": max(8, round(width / 8) * 8),
        }

    return build


def _moex(model: Settings) -> Settings:
    """Two matrices per expert instead of three, so experts are half as wide again."""
    return {"architecture": "moex", "moe_intermediate_size": round(1.5 * model["moe_intermediate_size"])}


def _late(architecture: str) -> Callable[[Settings], Settings]:
    """The variant `top2` with sums that arrive late; as many weights."""
    return lambda model: {"architecture": architecture, "router": "mixtral"}


def _readme(weigh: str) -> Callable[[Settings], Settings]:
    """One router for all layers; without weights it takes one expert per token, as wide as the preset's K together."""

    def build(model: Settings) -> Settings:
        own: Settings = {"architecture": "readme", "architecture_options": {"weigh": weigh}}
        if weigh == "probability":
            return own
        top_k = model.get("num_experts_per_tok", 2)
        num_experts = max(2, model.get("num_experts", 16) // top_k)
        width = model["moe_intermediate_size"] * top_k
        return own | {"num_experts": num_experts, "num_experts_per_tok": 1, "moe_intermediate_size": width}

    return build


# numbers of chains are iterations, those of recursive models recursions; latent experts share bases in groups of 4
ARCHITECTURE_VARIANTS: dict[str, Callable[[Settings], Settings]] = {
    "chain-1": _chain(1),
    "chain-2": _chain(2),
    "chain-2-shared-gate": _chain(2, shared_gate=True),
    "chain-1-deep": _chain(1, depth=2),
    "chain-1-normed": _chain(1, residual="normed"),
    "chain-2-normed": _chain(2, residual="normed"),
    "chain-1-normed-deep": _chain(1, residual="normed", depth=2),
    "dense": _recursions(1),
    "recursive-2": _recursions(2, choice="none"),
    "recursive-3": _recursions(3, choice="none"),
    "mor-expert-2": _recursions(2),
    "mor-expert-3": _recursions(3),
    "mor-expert-2-first-keys": _recursions(2, keys="first"),
    "mor-token-2": _recursions(2, choice="token"),
    "mor-token-3": _recursions(3, choice="token"),
    "mor-expert-2-moe": _recursions(2, "moe"),
    "latent": _latent(4, 0.25),
    "latent-half": _latent(4, 0.5),
    "moe-x": _moex,
    "ladder": _late("ladder"),
    "shortcut": _late("shortcut"),
    "read-me": _readme("one"),
    "read-me-weighted": _readme("probability"),
} | MEMORY_VARIANTS
