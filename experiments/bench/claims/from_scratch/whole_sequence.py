"""Routers that look at a whole sequence, on a task where that gives nothing away: denoising short paths.

In a language model Soft MoE and expert choice see tokens that are still to be predicted; a denoiser predicts no later
token. All variants cost the same per token, but for rounding of slots.
"""

from typing import Any

from ..claim import Row, small_decoder
from .paths import DENSE, HELD_OUT, POINTS, counted, held_out_loss, paths, train_denoiser

MIXTURE = small_decoder(vocab_size=1, num_experts=8)
"""Two of eight experts, as wide together as the dense network."""
TOKENS = POINTS + 1
"""Of a path, with the token of the noise level."""
CHOOSE_TWO = "tokens choose 2 of 8"


def whole_sequence_rows(steps: int, seed: int) -> list[Row]:
    """EDM's loss on held-out paths by router; experts see as many rows in each."""
    slots = round(TOKENS * MIXTURE["num_experts_per_tok"] / MIXTURE["num_experts"])
    variants: dict[str, dict[str, Any]] = {
        "dense": DENSE,
        "tokens choose 1 of 8": {"router": "switch", "num_experts_per_tok": 1, "moe_intermediate_size": 96},
        CHOOSE_TWO: {"router": "qwen3_moe"},
        "experts choose": {"router": "expert_choice"},
        "soft slots": {"router": "soft_moe", "router_options": {"slots_per_expert": slots}},
    }
    return [{"variant": name, **_denoised(settings, steps, seed)} for name, settings in variants.items()]


def _denoised(settings: dict[str, Any], steps: int, seed: int) -> dict[str, float]:
    import torch

    from moe import Denoiser, MoEConfig

    torch.manual_seed(seed)
    denoiser = Denoiser(MoEConfig(**MIXTURE | settings), width=2)
    train_denoiser(denoiser, steps, seed)
    held_out = paths(HELD_OUT, torch.Generator().manual_seed(10_000 + seed))
    loss, flops = counted(denoiser, lambda: held_out_loss(denoiser, held_out))
    return {"loss": loss, "mflop_per_path": flops / HELD_OUT / 1e6}
