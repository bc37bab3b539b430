"""Replay checkpoints: random weights whose routing reproduces a recorded trace, so that any engine can be measured.

Token id i stands for row i of the trace. Hidden dimensions [l * E, (l + 1) * E) of its embedding mark its experts at
MoE layer l; no `o_proj` or `down_proj` writes to the marked dimensions, and layer l's router reads just them. Feeding
ids 0, 1, 2, ... then routes every token exactly as it was recorded. The checkpoint is a plain `olmoe` one.

Shapes: T rows (the vocabulary), L MoE layers, E experts, K experts per token, D model width, F expert width.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import OlmoeConfig, OlmoeForCausalLM

from routing.ground.files import write_json
from routing.traces import EMPTY, RoutingTrace

# as in OLMoE, whose architecture the checkpoint has
HEAD_WIDTH = 128
# Weight of a mark in the router: large, so that the recorded experts stay ahead, in their order, after the norm and
# rounding to bfloat16. `check_replay` counts in how many rows they do.
ROUTER_SCALE = 32.0
# standard deviation of unmarked entries: small beside the marks, and transformers' usual initialisation
BACKGROUND = 0.02


@dataclass(frozen=True, kw_only=True)
class ReplaySize:
    """Widths of a replay checkpoint; the rest follows from the trace."""

    hidden: int = 2048
    expert: int = 1344


def build_replay(trace: RoutingTrace, folder: Path, size: ReplaySize, *, seed: int = 0) -> None:
    """Write a checkpoint that replays `trace`, one shard per layer, never holding more than one layer.

    Args:
        trace: its rows become the vocabulary.
        folder: where the checkpoint goes; created if needed.
        size: model and expert width.

    Raises:
        ValueError: if L * E > D, or a row has empty slots.
    """
    marks = trace.num_layers * trace.num_experts
    if marks > size.hidden:
        raise ValueError(f"the marks of {trace.num_layers} x {trace.num_experts} experts need {marks} <= {size.hidden}")
    if (trace.expert_TLK == EMPTY).any():
        raise ValueError("the trace has empty slots; a replay needs K experts in every layer of every row")
    folder.mkdir(parents=True, exist_ok=True)
    _config(trace, size).save_pretrained(folder)
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(seed)
    for name, tensors in _shards(trace, size, generator):
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def check_replay(folder: Path, trace: RoutingTrace, rows: int) -> float:
    """Share of the first `rows` rows' experts that an unchanged transformers router would choose."""
    from safetensors import safe_open

    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]

    def read(name: str) -> torch.Tensor:
        with safe_open(folder / index[name], framework="pt") as file:
            return file.get_tensor(name).float()

    x_TD = read("model.embed_tokens.weight")[:rows]
    x_TD = x_TD * torch.rsqrt(x_TD.pow(2).mean(-1, keepdim=True))
    right = 0
    for layer in range(trace.num_layers):
        logits_TE = x_TD @ read(f"model.layers.{layer}.mlp.gate.weight").t()
        chosen = logits_TE.topk(trace.top_k).indices
        recorded = torch.from_numpy(trace.expert_TLK[:rows, layer].astype("int64"))
        right += int((chosen == recorded).sum())
    return right / (rows * trace.num_layers * trace.top_k)


def replay_bytes(trace: RoutingTrace, size: ReplaySize) -> int:
    """Size of the checkpoint on disk, in bytes."""
    experts = trace.num_layers * trace.num_experts * 3 * size.hidden * size.expert
    attention = trace.num_layers * 4 * size.hidden**2
    return 2 * (experts + attention + 2 * trace.num_tokens * size.hidden)


def _config(trace: RoutingTrace, size: ReplaySize) -> OlmoeConfig:
    return OlmoeConfig(
        vocab_size=trace.num_tokens,
        hidden_size=size.hidden,
        intermediate_size=size.expert,
        num_hidden_layers=trace.num_layers,
        num_attention_heads=max(size.hidden // HEAD_WIDTH, 1),
        num_key_value_heads=max(size.hidden // HEAD_WIDTH, 1),
        num_experts=trace.num_experts,
        num_experts_per_tok=trace.top_k,
        max_position_embeddings=4096,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        dtype="bfloat16",
        architectures=[OlmoeForCausalLM.__name__],
    )


def _shards(
    trace: RoutingTrace, size: ReplaySize, generator: torch.Generator
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    marks = trace.num_layers * trace.num_experts

    def random(*shape: int, scale: float) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, scale, generator=generator)

    head = random(trace.num_tokens, size.hidden, scale=BACKGROUND)
    outer = {
        "model.embed_tokens.weight": _marked_embedding(trace, random(trace.num_tokens, size.hidden, scale=BACKGROUND)),
        "model.norm.weight": torch.ones(size.hidden, dtype=torch.bfloat16),
        "lm_head.weight": head,
    }
    yield "model-outer.safetensors", outer
    flat = size.hidden * size.expert
    pool = random(trace.num_experts * 3 * flat, scale=size.hidden**-0.5)
    for layer in range(trace.num_layers):
        yield f"model-layer-{layer:03d}.safetensors", _layer(trace, size, layer, marks, pool.roll(7919 * layer), random)


def _layer(
    trace: RoutingTrace,
    size: ReplaySize,
    layer: int,
    marks: int,
    pool: torch.Tensor,
    random: Callable[..., torch.Tensor],
) -> dict[str, torch.Tensor]:
    prefix, hidden, expert = f"model.layers.{layer}.", size.hidden, size.expert
    tensors = {f"{prefix}self_attn.{name}_proj.weight": random(hidden, hidden, scale=hidden**-0.5) for name in "qkvo"}
    tensors[f"{prefix}self_attn.o_proj.weight"][:marks] = 0
    for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    gate_ED = torch.zeros(trace.num_experts, hidden, dtype=torch.bfloat16)
    ids = torch.arange(trace.num_experts)
    gate_ED[ids, layer * trace.num_experts + ids] = ROUTER_SCALE
    tensors[f"{prefix}mlp.gate.weight"] = gate_ED
    for number, matrices in enumerate(pool.view(trace.num_experts, 3, hidden * expert)):
        down = matrices[2].view(hidden, expert).clone()
        down[:marks] = 0
        name = f"{prefix}mlp.experts.{number}."
        tensors[f"{name}gate_proj.weight"] = matrices[0].view(expert, hidden).clone()
        tensors[f"{name}up_proj.weight"] = matrices[1].view(expert, hidden).clone()
        tensors[f"{name}down_proj.weight"] = down
    return tensors


def _marked_embedding(trace: RoutingTrace, embedding: torch.Tensor) -> torch.Tensor:
    """Marks fall with the slot, so that the order of a row's experts is kept as well."""
    T, L, K = trace.expert_TLK.shape
    embedding[:, : L * trace.num_experts] = 0
    columns = torch.from_numpy(trace.expert_TLK.astype("int64")) + (torch.arange(L) * trace.num_experts)[None, :, None]
    levels = torch.linspace(2.0, 1.0, K, dtype=torch.bfloat16).expand(T, L, K)
    return embedding.scatter_(1, columns.reshape(T, L * K), levels.reshape(T, L * K))
