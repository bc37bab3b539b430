"""Mixtures of one text model at equal operations per token: memory layers against many small experts.

The variants are those of `expertier compare`, made from one mixture's sizes: as many parameters, and as many neurons or
reads as the mixture's operations pay for.
"""

from typing import Any

from ....variants.architectures import ARCHITECTURE_VARIANTS
from ..claim import Row, small_decoder
from ..domains import LENGTH, bits_per_byte, held_out_rows, tune

MIXTURE = small_decoder(vocab_size=256, num_experts=32, num_experts_per_tok=8, moe_intermediate_size=16)
"""Eight experts of a token, as in the mixtures that UltraMemV2 is compared with."""
DOMAINS = ("prose", "python")
EIGHT = "8 of 32 experts"


def memory_rows(steps: int, seed: int) -> list[Row]:
    """Bits per byte of the mixture, of one with two large experts, of a dense network, and of both memory layers."""
    F = MIXTURE["moe_intermediate_size"]
    variants: dict[str, dict[str, Any]] = {
        EIGHT: {"router": "qwen3_moe"},
        "2 of 8 experts": {"router": "qwen3_moe", **_experts(8, 2, 4 * F)},
        "dense": {"router": "qwen3_moe", **_experts(1, 1, 8 * F)},
        **{name: ARCHITECTURE_VARIANTS[name](MIXTURE) for name in ("ultramem", "peer")},
    }
    return [_trained(name, settings, steps, seed) for name, settings in variants.items()]


def _experts(num_experts: int, top_k: int, width: int) -> dict[str, int]:
    return {"num_experts": num_experts, "num_experts_per_tok": top_k, "moe_intermediate_size": width}


def _trained(name: str, settings: dict[str, Any], steps: int, seed: int) -> Row:
    import torch

    from moe import MoEConfig, MoEForCausalLM

    from ....compare.measures.flops import measured_usage, token_flops

    torch.manual_seed(seed)
    model = MoEForCausalLM(MoEConfig(**MIXTURE | settings))
    tune(model, DOMAINS, steps, seed)
    token_BS = held_out_rows(DOMAINS[0])
    with torch.no_grad():
        usage = measured_usage([model(token_BS, use_cache=False)], token_BS.numel())
    bits = {f"bits_{domain}": bits_per_byte(model, domain) for domain in DOMAINS}
    return {
        "variant": name,
        "bits_mean": sum(bits.values()) / len(bits),
        **bits,
        "kflop_per_token": token_flops(model, usage, sequence_length=LENGTH).total / 1e3,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
