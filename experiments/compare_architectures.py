"""ARCHITECTURE_VARIANTS: variants of `expertier compare` that change more than the router, made from a preset's sizes."""

from collections.abc import Callable
from typing import Any

from .compare_memory import MEMORY_VARIANTS

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


ARCHITECTURE_VARIANTS: dict[str, Callable[[Settings], Settings]] = {
    "chain-1": _chain(1),
    "chain-2": _chain(2),
    "chain-2-shared-gate": _chain(2, shared_gate=True),
    "chain-1-deep": _chain(1, depth=2),
    "chain-1-normed": _chain(1, residual="normed"),
    "chain-2-normed": _chain(2, residual="normed"),
    "chain-1-normed-deep": _chain(1, residual="normed", depth=2),
} | MEMORY_VARIANTS
