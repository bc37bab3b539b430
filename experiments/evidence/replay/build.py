"""Writing a replay checkpoint, one shard per layer, and checking how it routes.

Token id i stands for row i of the trace. Hidden dimensions [l * E, (l + 1) * E) of its embedding mark its experts at
MoE layer l; no `o_proj` or `down_proj` writes to the marked dimensions, and layer l's router reads just them. Feeding
ids 0, 1, 2, ... then routes every token exactly as it was recorded.

Shapes: T rows (the vocabulary), L MoE layers, E experts, K experts per token, D model width, F expert width.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GptOssConfig, OlmoeConfig

from routing.ground.files import write_json
from routing.traces import RoutingTrace

from .experts import QUANTISATION, draw_pool, expert_tensors
from .size import ReplaySize, expect_replayable

# as in OLMoE, whose architecture all forms but mxfp4 have
HEAD_WIDTH = 128
# as in gpt-oss-20b: eight heads of queries share one of keys, and every second layer sees 128 tokens
GPT_OSS_HEAD_WIDTH, GPT_OSS_SHARED_HEADS, GPT_OSS_HEADS_PER_WIDTH, GPT_OSS_WINDOW = 64, 8, 64 / 2880, 128
# Weight of a mark in the router: large, so that the recorded experts stay ahead, in their order, after the norm and
# rounding to bfloat16. `check_replay` counts in how many rows they do.
ROUTER_SCALE = 32.0
# standard deviation of unmarked entries: small beside the marks, and transformers' usual initialisation
BACKGROUND = 0.02

Random = Callable[..., torch.Tensor]
Tensors = dict[str, torch.Tensor]


def build_replay(trace: RoutingTrace, folder: Path, size: ReplaySize, *, seed: int = 0) -> None:
    """Write a checkpoint that replays `trace`, one shard per layer, never holding more than one layer.

    Args:
        trace: its rows become the vocabulary.
        folder: where the checkpoint goes; created if needed.
        size: model and expert width, and the stored form.

    Raises:
        ValueError: if L * E > D, a row has empty slots, or widths do not suit the form.
    """
    expect_replayable(trace, size)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**_config(trace, size).to_dict(), "dtype": "bfloat16"}
    if size.form in QUANTISATION:
        config["quantization_config"] = QUANTISATION[size.form]
    write_json(folder / "config.json", config)
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(seed)
    for name, tensors in _shards(trace, size, generator):
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def check_replay(folder: Path, trace: RoutingTrace, rows: int) -> float:
    """Share of the first `rows` rows' experts, or of all, that an unchanged transformers router would choose."""
    from safetensors import safe_open

    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    router = "router" if "model.layers.0.mlp.router.weight" in index else "gate"

    def read(name: str) -> torch.Tensor:
        with safe_open(folder / index[name], framework="pt") as file:
            return file.get_tensor(name).float()

    x_TD = read("model.embed_tokens.weight")[:rows]
    x_TD = x_TD * torch.rsqrt(x_TD.pow(2).mean(-1, keepdim=True))
    right, rows = 0, len(x_TD)
    for layer in range(trace.num_layers):
        logits_TE = x_TD @ read(f"model.layers.{layer}.mlp.{router}.weight").t()
        chosen = logits_TE.topk(trace.top_k).indices
        recorded = torch.from_numpy(trace.expert_TLK[:rows, layer].astype("int64"))
        right += int((chosen == recorded).sum())
    return right / (rows * trace.num_layers * trace.top_k)


def _config(trace: RoutingTrace, size: ReplaySize) -> OlmoeConfig | GptOssConfig:
    common: dict[str, Any] = {
        "vocab_size": trace.num_tokens,
        "hidden_size": size.hidden,
        "intermediate_size": size.expert,
        "num_hidden_layers": trace.num_layers,
        "num_experts_per_tok": trace.top_k,
        "max_position_embeddings": 4096,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if size.form == "mxfp4":
        heads = _gpt_oss_heads(size)
        return GptOssConfig(
            **common,
            architectures=["GptOssForCausalLM"],
            num_local_experts=trace.num_experts,
            num_attention_heads=heads,
            num_key_value_heads=heads // GPT_OSS_SHARED_HEADS,
            head_dim=GPT_OSS_HEAD_WIDTH,
            sliding_window=GPT_OSS_WINDOW,
        )
    heads = max(size.hidden // HEAD_WIDTH, 1)
    return OlmoeConfig(
        **common,
        architectures=["OlmoeForCausalLM"],
        num_experts=trace.num_experts,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )


def _gpt_oss_heads(size: ReplaySize) -> int:
    """Heads of queries: 64 at gpt-oss-20b's width, and in proportion."""
    groups = round(size.hidden * GPT_OSS_HEADS_PER_WIDTH / GPT_OSS_SHARED_HEADS)
    return max(groups, 1) * GPT_OSS_SHARED_HEADS


def _shards(trace: RoutingTrace, size: ReplaySize, generator: torch.Generator) -> Iterator[tuple[str, Tensors]]:
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
    pool, attention = draw_pool(size, trace.num_experts, generator), _attention_of(size)
    for layer in range(trace.num_layers):
        prefix, pool_EMW = f"model.layers.{layer}.", pool.roll(7919 * layer).view(trace.num_experts, 3, -1)
        tensors = attention(size, prefix, marks, random) | _router(trace, size, layer, prefix)
        tensors |= expert_tensors(size, pool_EMW, marks, f"{prefix}mlp.experts.", generator)
        yield f"model-layer-{layer:03d}.safetensors", tensors


def _attention_of(size: ReplaySize) -> Callable[[ReplaySize, str, int, Random], Tensors]:
    return _gpt_oss_attention if size.form == "mxfp4" else _olmoe_attention


def _olmoe_attention(size: ReplaySize, prefix: str, marks: int, random: Random) -> Tensors:
    hidden = size.hidden
    tensors = {f"{prefix}self_attn.{name}_proj.weight": random(hidden, hidden, scale=hidden**-0.5) for name in "qkvo"}
    tensors[f"{prefix}self_attn.o_proj.weight"][:marks] = 0
    for name in ("self_attn.q_norm", "self_attn.k_norm", "input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return tensors


def _gpt_oss_attention(size: ReplaySize, prefix: str, marks: int, random: Random) -> Tensors:
    hidden, heads = size.hidden, _gpt_oss_heads(size)
    width, shared = heads * GPT_OSS_HEAD_WIDTH, heads * GPT_OSS_HEAD_WIDTH // GPT_OSS_SHARED_HEADS
    shapes = {"q": (width, hidden), "k": (shared, hidden), "v": (shared, hidden), "o": (hidden, width)}
    tensors: Tensors = {f"{prefix}self_attn.sinks": random(heads, scale=BACKGROUND)}
    for name, shape in shapes.items():
        tensors[f"{prefix}self_attn.{name}_proj.weight"] = random(*shape, scale=shape[1] ** -0.5)
        tensors[f"{prefix}self_attn.{name}_proj.bias"] = random(shape[0], scale=BACKGROUND)
    for part in ("weight", "bias"):
        tensors[f"{prefix}self_attn.o_proj.{part}"][:marks] = 0
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return tensors


def _router(trace: RoutingTrace, size: ReplaySize, layer: int, prefix: str) -> Tensors:
    gate_ED = torch.zeros(trace.num_experts, size.hidden, dtype=torch.bfloat16)
    ids = torch.arange(trace.num_experts)
    gate_ED[ids, layer * trace.num_experts + ids] = ROUTER_SCALE
    if size.form != "mxfp4":
        return {f"{prefix}mlp.gate.weight": gate_ED}
    bias_E = torch.zeros(trace.num_experts, dtype=torch.bfloat16)
    return {f"{prefix}mlp.router.weight": gate_ED, f"{prefix}mlp.router.bias": bias_E}


def _marked_embedding(trace: RoutingTrace, embedding: torch.Tensor) -> torch.Tensor:
    """Marks fall with the slot, so that the order of a row's experts is kept as well."""
    T, L, K = trace.expert_TLK.shape
    embedding[:, : L * trace.num_experts] = 0
    columns = torch.from_numpy(trace.expert_TLK.astype("int64")) + (torch.arange(L) * trace.num_experts)[None, :, None]
    levels = torch.linspace(2.0, 1.0, K, dtype=torch.bfloat16).expand(T, L, K)
    return embedding.scatter_(1, columns.reshape(T, L * K), levels.reshape(T, L * K))
