"""Every architecture and every router, trained alike on prose: that each learns, how much, and how evenly it routes.

No ranking of papers: sizes are those of the examples in the catalogues, operations are not equal, steps are few.
"""

import math
from collections.abc import Mapping
from typing import Any

from ..claim import Row
from ..domains import bits_per_byte, held_out_rows, tune

TINY = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 6,
    "num_experts_per_tok": 2,
}
"""The sizes that examples of the catalogues are made for."""
DOMAIN = "prose"
NOTHING_TO_LEARN = {"forced"}


def architecture_rows(steps: int, seed: int) -> list[Row]:
    """Each entry of `ARCHITECTURES` by its example."""
    from moe import ARCHITECTURES

    return [_trained(name, {"architecture": name, **row.example}, steps, seed) for name, row in ARCHITECTURES.items()]


def router_rows(steps: int, seed: int) -> list[Row]:
    """Each entry of `ROUTERS` by its example, with the balance coefficient of its row; `forced` has none to train."""
    from routing import ROUTERS

    rows = []
    for name, row in ROUTERS.items():
        if name in NOTHING_TO_LEARN:
            continue
        settings: dict[str, Any] = {
            "router": name,
            "router_options": dict(row.example.options),
            "num_experts_per_tok": row.example.top_k,
            "zero_compute_experts": list(row.example.zero_compute),
        }
        if row.balance_weight is not None:
            settings["balance_loss_weight"] = row.balance_weight
        rows.append(_trained(name, settings, steps, seed))
    return rows


def _trained(name: str, settings: Mapping[str, Any], steps: int, seed: int) -> Row:
    import torch

    from moe import MoEConfig, MoEForCausalLM

    torch.manual_seed(seed)
    model = MoEForCausalLM(MoEConfig(**TINY | settings))
    before = bits_per_byte(model.eval(), DOMAIN)
    tune(model, [DOMAIN], steps, seed)
    with torch.no_grad():
        stats = model(held_out_rows(DOMAIN), use_cache=False).router_stats
    loads = [one.count_R[: one.num_experts].double() for one in stats or [] if hasattr(one, "chosen")]
    entropies = [_evenness(load_E) for load_E in loads if load_E.sum() and len(load_E) > 1]
    return {
        "variant": name,
        "bits_per_byte": bits_per_byte(model, DOMAIN),
        "bits_before": before,
        "evenness": sum(entropies) / len(entropies) if entropies else None,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _evenness(load_E: Any) -> float:
    """Entropy of the load over that of an even one: 1 where experts are visited alike, 0 where one has all."""
    share_E = load_E / load_E.sum()
    return float(-(share_E[share_E > 0] * share_E[share_E > 0].log()).sum()) / math.log(len(share_E))
