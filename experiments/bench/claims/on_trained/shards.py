"""Mixture of Shards against LoRA: adapters of one dense model, tuned on one domain after another, each from the start.

LoRA is the same code with private shards alone, which a test shows; so both start and scale alike.
"""

from statistics import fmean
from typing import Any

from ..claim import Row
from ..domains import bits_per_byte, dense_model, tune

BASE, NEW = ("prose", "python"), ("tables", "markup")
LAYERS = 6
"""Enough matrices of a kind for sharing to pay."""
RATE = 5e-3
"""Of adapters, one for all variants; not tuned."""
FULL: dict[str, Any] = {"rank": 6, "budget_rank": 2, "private_rank": 1, "shards": 4}
"""Five layers share one rank each, so a matrix can draw five ranks at most; the paper's models have 32 layers."""
# LoRA of the pools' size, and LoRA of the adapters' rank, which trains three times as many numbers
LORA, WIDE_LORA = "LoRA of rank 2", "LoRA of rank 6"
WITHOUT: dict[str, dict[str, Any]] = {
    "without dissociated pairs": {"is_dissociated": False},
    "without sharded vectors": {"shards": 1},
    "without private shards": {"private_rank": 0},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "mixture of shards": FULL,
    LORA: {"rank": 2, "budget_rank": 2, "private_rank": 2, "shards": 1},
    WIDE_LORA: {"rank": 6, "budget_rank": 6, "private_rank": 6, "shards": 1},
    **{name: FULL | change for name, change in WITHOUT.items()},
}


def shard_rows(steps: int, seed: int) -> list[Row]:
    """Bits per byte of domains that the base model did not see, by adapter; the rest of the model is frozen."""
    from moe import ShardPlan, attach_shards

    base = dense_model(96, seed, num_hidden_layers=LAYERS, num_dense_layers=LAYERS - 1, intermediate_size=96)
    tune(base, BASE, 4 * steps, seed)
    rows = [_row("base", {name: bits_per_byte(base, name) for name in NEW}, 0)]
    for variant, sizes in VARIANTS.items():
        bits, trained = {}, 0
        for name in NEW:
            adapters = attach_shards(base, ShardPlan(**sizes, seed=seed))
            tune(base, [name], steps, seed, parameters=adapters.parameters(), rate=RATE)
            bits[name] = bits_per_byte(base, name)
            trained = sum(parameter.numel() for parameter in adapters.parameters())
            adapters.remove()
        rows.append(_row(variant, bits, trained))
    return rows


def _row(variant: str, bits: dict[str, float], trained: int) -> Row:
    means = {f"bits_{name}": value for name, value in bits.items()}
    return {"variant": variant, "bits_mean": fmean(bits.values()), **means, "trained_numbers": trained}
