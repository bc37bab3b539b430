"""What the process needs in memory besides expert slots."""

from collections.abc import Sequence
from typing import Any

import torch

from ..checkpoint.experts import ExpertLayer
from ..compute.resident import expansion_bytes, weight_bytes
from ..memory.budget import Needs, kv_bytes_per_token
from ..ram.expanded import room_bytes
from ..store.store import READ_BYTES


def experts_per_token(config: Any) -> int:
    """K, from the names that configs use for it."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("num_experts_per_tok", "moe_topk", "moe_top_k", "num_selected_experts", "top_k_experts", "expert_top_k")
    for name in names:
        value = getattr(text, name, None)
        if isinstance(value, list | tuple) and value:
            value = max(value)
        if isinstance(value, int) and value > 0:
            return value
    return 1


def memory_needs(
    config: Any,
    model: Any,
    layers: Sequence[ExpertLayer],
    dtype: torch.dtype,
    context: int,
    io_threads: int,
    process_bytes: int,
) -> Needs:
    """What the process needs besides expert slots, with `context` tokens of KV cache."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width, vocabulary = int(getattr(text, "hidden_size", 0) or 0), int(getattr(text, "vocab_size", 0) or 0)
    rows = context * max(experts_per_token(config), 1)
    expanded = expansion_bytes(model) if any(layer.compressed_E is not None for layer in layers) else 0
    return Needs(
        process_bytes=process_bytes,
        weight_bytes=weight_bytes(model),
        kv_bytes=context * kv_bytes_per_token(config, dtype.itemsize),
        activation_bytes=4 * vocabulary * 4 + rows * width * dtype.itemsize * 8 + expanded,
        staging_bytes=io_threads * READ_BYTES + room_bytes(layers),
    )
