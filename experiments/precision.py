"""Which number format multiplies matrices faster on this machine, the way experts do: with ever-changing row counts.

A library that prepares each new shape anew can make bfloat16 several times slower than float32 here, although it is
faster on one large product.
"""

import time
from functools import lru_cache

import torch

WIDTH, ROUNDS, HEIGHTS = 256, 4, 60


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` becomes `bfloat16` where it is at least 1.2 times as fast as `float32`; other names stay."""
    return _faster(device) if precision == "auto" else precision


@lru_cache
def _faster(device: torch.device) -> str:
    """Asked once per process: the second time no shape would be new."""
    return "bfloat16" if _seconds(torch.float32, device) > 1.2 * _seconds(torch.bfloat16, device) else "float32"


def _seconds(dtype: torch.dtype, device: torch.device) -> float:
    """Median time of a round of products, whose heights no earlier round had."""
    right = torch.ones(WIDTH, 2 * WIDTH, dtype=dtype, device=device)
    samples = []
    for number in range(ROUNDS):
        start = time.perf_counter()
        for height in range(HEIGHTS):
            rows = torch.ones(WIDTH + number + ROUNDS * height, WIDTH, dtype=dtype, device=device)
            total = (rows @ right).sum()
        total.item()
        samples.append(time.perf_counter() - start)
    return sorted(samples[1:])[len(samples) // 2 - 1]
