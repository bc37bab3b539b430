"""Which number format trains a model faster on this machine, asked of what its steps do most: experts.

A library that prepares each new shape anew, or a processor that has to emulate the narrow format, can make bfloat16
slower than float32 here, although it is faster on one large product elsewhere.
"""

import time
from functools import lru_cache

import torch

from .description.config import TrainConfig

ROUNDS = 7
"""Timings per format: two to warm up, then the median of five, which one slow timing does not move."""


def resolve_precision(config: TrainConfig, device: torch.device) -> str:
    """`auto` becomes `bfloat16` where it is at least 1.2 times as fast as `float32`; other names stay."""
    if config.precision != "auto":
        return config.precision
    from moe import MoEConfig

    model = MoEConfig(**config.model)
    sizes = (model.hidden_size, model.moe_intermediate_size, model.num_experts, model.num_experts_per_tok)
    return _faster(config.batch_size * config.sequence_length, *sizes, device)


@lru_cache
def _faster(T: int, D: int, F: int, E: int, K: int, device: torch.device) -> str:
    """Asked once per process and size, so that its runs agree."""
    single_s, half_s = (_seconds(precision, T, D, F, E, K, device) for precision in ("float32", "bfloat16"))
    return "bfloat16" if single_s > 1.2 * half_s else "float32"


def _seconds(precision: str, T: int, D: int, F: int, E: int, K: int, device: torch.device) -> float:
    """Median time of a forward and backward pass through a layer of experts, each with a routing of its own."""
    from moe import Experts, MoEConfig, expertier_experts

    experts = Experts(MoEConfig(hidden_size=D, moe_intermediate_size=F, num_experts=E, num_experts_per_tok=K))
    experts = experts.to(device)
    for parameter in experts.parameters():
        torch.nn.init.constant_(parameter, 1 / D)
    # of its own: a run that asks for its precision must not find its random numbers moved
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.ones(T, D, device=device, requires_grad=True)
    combine_TK = torch.ones(T, K, device=device)
    samples = []
    for _ in range(ROUNDS):
        expert_TK = torch.rand(T, E, generator=generator).to(device).topk(K).indices
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            y_TD = expertier_experts(experts, x_TD, expert_TK, combine_TK)
        y_TD.sum().backward()
        x_TD.grad[0, 0].item()
        samples.append(time.perf_counter() - start)
    # the first ones prepare what later ones find ready
    return sorted(samples[2:])[(ROUNDS - 2) // 2]
