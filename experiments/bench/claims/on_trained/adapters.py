"""Glider: adapters tuned apart on four domains, gates tuned on the frozen adapters, a bias from a task's text.

The embedding of a task is the counts of the byte trigrams of a text of it, hashed: the paper's comes from a language
model that reads instructions, which is not at hand here.

Source: Li et al. 2024 (Glider), arXiv:2410.07172, section 3.

Shapes: L MoE layers, E experts, A = width of the embeddings.
"""

from statistics import fmean
from typing import TYPE_CHECKING, Any

import numpy as np

from ..claim import Row
from ..domains import bits_per_byte, dense_model, training_part, tune

if TYPE_CHECKING:
    from torch import Tensor

HELD_IN, HELD_OUT = ("prose", "tables", "markup", "sums"), ("python", "changes")
BASE = (*HELD_IN, *HELD_OUT)
# a small rank of LoRA, trigrams hashed to few places, a page of text for each task: toy sizes, chosen once
RANK, EMBEDDING_WIDTH, TASK_BYTES = 8, 512, 4_096
SCALES = {"held_in": 100.0, "held_out": 3.0}
"""Published scales of the bias, for tasks that were tuned on and for others."""
ADAPTER_RATE = 2e-2
"""Higher than the base model's, since an adapter's output is divided by its rank."""


def glider_rows(steps: int, seed: int) -> list[Row]:
    """The base model, one adapter for all domains, each domain's own adapter, local gates, and gates with the bias."""
    import torch

    base = dense_model(96, seed)
    tune(base, BASE, 2 * steps, seed)
    rows = [_row("base", lambda name: bits_per_byte(base, name))]
    together = with_adapters(base, 1, seed)
    tune(together, HELD_IN, 2 * steps, seed, parameters=adapters_of(together), rate=ADAPTER_RATE)
    rows.append(_row("one adapter for all", lambda name: bits_per_byte(together, name)))
    model = tuned_apart(base, 2 * steps // len(HELD_IN), seed)

    def own(name: str) -> float | None:
        if name not in HELD_IN:
            return None
        return bits_per_byte(model, name, logit_bias_LR=only(model, HELD_IN.index(name)))

    rows.append(_row("own adapter", own))
    rows.append(_row("local gates", lambda name: bits_per_byte(model, name)))
    embedding_EA = torch.stack([task_embedding(name) for name in HELD_IN])
    expert_LEA = embedding_EA.expand(len(model.model.routers), -1, -1)

    def guided(name: str) -> float:
        from routing import task_bias

        scale = SCALES["held_in" if name in HELD_IN else "held_out"]
        return bits_per_byte(model, name, logit_bias_LR=task_bias(task_embedding(name), expert_LEA, scale))

    rows.append(_row("local gates and task", guided))
    return rows


def tuned_apart(base: Any, steps: int, seed: int) -> Any:
    """A model with one adapter per held-in domain: each tuned alone, then each one's gate on it, both frozen after."""
    model = with_adapters(base, len(HELD_IN), seed)
    for number, name in enumerate(HELD_IN):
        bias = only(model, number)
        tune(model, [name], steps, seed + number, parameters=adapters_of(model), rate=ADAPTER_RATE, logit_bias_LR=bias)
    gates = [router.weight for router in model.model.routers]
    for number, name in enumerate(HELD_IN):
        for router in model.model.routers:
            router.tuned_expert = number
        tune(model, [name], max(1, steps // 2), seed + number, parameters=gates)
    for router in model.model.routers:
        router.tuned_expert = None
    return model


def with_adapters(base: Any, count: int, seed: int) -> Any:
    """The base model with untrained adapters beside its feed-forward networks: the same function, to begin with."""
    import torch

    from moe import MoEConfig, MoEForCausalLM

    torch.manual_seed(seed)
    changes = {
        "architecture": "glider",
        "architecture_options": {"rank": RANK},
        "router": "qwen3_moe",
        "num_experts": count,
        "num_experts_per_tok": min(2, count),
        "num_shared_experts": 1,
        "balance_loss_weight": 0.0,
        "z_loss_weight": 0.0,
    }
    model = MoEForCausalLM(MoEConfig(**base.config.to_diff_dict() | changes))
    weights = model.state_dict()
    for name, value in base.state_dict().items():
        if ".mlp." not in name:
            weights[name] = value
    for place, layer in enumerate(base.model.moe_layers):
        gate, up = layer.experts.gate_up_proj[0].chunk(2)
        for part, value in (("gate_proj", gate), ("up_proj", up), ("down_proj", layer.experts.down_proj[0])):
            weights[f"model.layers.{place}.mlp.shared.{part}.weight"] = value
        weights[f"model.layers.{place}.mlp.router.weight"] = torch.zeros_like(model.model.routers[place].weight)
    model.load_state_dict(weights)
    return model.eval()


def adapters_of(model: Any) -> list[Any]:
    """The parameters of all adapters."""
    return [parameter for layer in model.model.moe_layers for parameter in layer.experts.parameters()]


def only(model: Any, expert: int) -> "Tensor":
    """A bias that forbids every expert but one, whose weight is then 1."""
    import torch

    bias_LR = torch.full((len(model.model.routers), model.config.num_experts), -torch.inf)
    bias_LR[:, expert] = 0.0
    return bias_LR


def task_embedding(name: str) -> "Tensor":
    """float32 [A]: how often each hashed byte trigram stands at the beginning of a domain, its mean taken off."""
    import torch

    text = training_part(name)[:TASK_BYTES].astype(np.int64)
    trigram = (text[:-2] * 65_599 + text[1:-1] * 257 + text[2:]) % EMBEDDING_WIDTH
    count_A = np.bincount(trigram, minlength=EMBEDDING_WIDTH).astype(np.float32)
    return torch.from_numpy(np.sqrt(count_A) - np.sqrt(count_A).mean())


def _row(variant: str, judge: Any) -> Row:
    found = {name: judge(name) for name in BASE}
    means = {
        f"bits_{kind}": None if None in values else fmean(values)
        for kind, names in (("held_in", HELD_IN), ("held_out", HELD_OUT))
        if (values := [found[name] for name in names])
    }
    return {"variant": variant, **means, **{f"bits_{name}": value for name, value in found.items()}}
