"""HDEE: experts of domains with sizes and steps of their own, at the training compute of equal ones.

Source: HDEE 2025, arXiv:2502.19385: homogeneous or heterogeneous models and data. The official configurations are for
three domains of different difficulty; here they are additions, character maps and prose.
"""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from ..claim import Row
from ..domains import LENGTH, bits_per_byte, dense_model, tune

WIDTHS = {"easy": 48, "middle": 96, "hard": 144}
"""Hidden units of the unequal members; equal ones have the middle width."""
SHARES = {"easy": 0.5, "middle": 1.0, "hard": 1.5}
"""Steps of the unequal runs, of those of an equal one."""
DIFFICULTY = {"sums": "easy", "tables": "middle", "prose": "hard"}


def hdee_rows(steps: int, seed: int) -> list[Row]:
    """Equal members, unequal steps, unequal sizes; each set of three trained for the same operations in all."""
    equal = dict.fromkeys(DIFFICULTY, WIDTHS["middle"])
    sized = {name: WIDTHS[level] for name, level in DIFFICULTY.items()}
    all_steps = dict.fromkeys(DIFFICULTY, float(steps))
    uneven = {name: steps * SHARES[level] for name, level in DIFFICULTY.items()}
    return [
        _row("equal members", equal, all_steps, steps, seed),
        _row("unequal steps", equal, uneven, steps, seed),
        _row("unequal sizes", sized, all_steps, steps, seed),
    ]


def _row(variant: str, widths: Mapping[str, int], shares: Mapping[str, float], steps: int, seed: int) -> dict[str, Any]:
    from moe import ensemble

    budget = steps * sum(step_flops(dense_model(WIDTHS["middle"], seed)) for _ in DIFFICULTY)
    models = {name: dense_model(widths[name], seed + place) for place, name in enumerate(DIFFICULTY)}
    wanted = sum(shares[name] * step_flops(model) for name, model in models.items())
    spent = 0.0
    for place, (name, model) in enumerate(models.items()):
        own = round(shares[name] * budget / wanted)
        spent += own * step_flops(model)
        tune(model, [name], own, seed + place)
    mixed = ensemble(list(models.values()))
    bits = {f"bits_{name}": bits_per_byte(mixed, name) for name in DIFFICULTY}
    return {"variant": variant, **bits, "bits_mean": fmean(bits.values()), "compute_of_equal": spent / budget}


def step_flops(model: Any) -> float:
    """Operations of a forward pass per token, of which a training step takes three times as many."""
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name)
    config = model.config
    scores = 2 * config.num_attention_heads * config.head_dim * (LENGTH + 1) / 2
    return 2.0 * (matrices + config.num_hidden_layers * scores)
