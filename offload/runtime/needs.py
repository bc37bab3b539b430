"""What the process needs in memory besides expert slots."""

from typing import Any

import torch

from routing.ground.model_config import text_config

from ..compute.resident import expansion_bytes, weight_bytes
from ..memory.budget import Needs, kv_bytes_per_token
from ..ram.expanded import room_bytes
from ..store.store import READ_BYTES
from .opening import OpenedCheckpoint
from .options import LoadOptions

MOST_SCORE_BYTES = 512 << 20
"""Attention scores of one layer, above which a prompt is read in pieces. Smaller pieces read nearly all experts again
for each; 64 heads of 2,048 tokens would take 2.1 GB."""
LEAST_PIECE = 128
"""Tokens of the smallest piece: each one more reads nearly all experts of the model again. Not tuned."""


def attention_bytes(config: Any, tokens: int, context: int, item_bytes: int) -> int:
    """Scores that an `eager` attention holds at once: as computed, in float32 for the softmax, and its result."""
    text = text_config(config)
    if getattr(text, "_attn_implementation", None) != "eager":
        return 0
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    return heads * tokens * context * (2 * item_bytes + 4)


def prefill_tokens(config: Any, context: int) -> int:
    """Tokens of a prompt that are computed at once, so that attention scores stay below MOST_SCORE_BYTES."""
    tokens = context
    while tokens > LEAST_PIECE and attention_bytes(config, tokens, context, 2) > MOST_SCORE_BYTES:
        tokens = -(-tokens // 2)
    return tokens


def memory_needs(opened: OpenedCheckpoint, options: LoadOptions) -> Needs:
    """The parts of a budget that are not expert slots, with `options.context` tokens of KV cache."""
    config, model = opened.config, opened.model
    text = text_config(config)
    width, vocabulary = int(getattr(text, "hidden_size", 0) or 0), int(getattr(text, "vocab_size", 0) or 0)
    dtype: torch.dtype = model.dtype
    rows = prefill_tokens(config, options.context) * opened.top_k
    scores = attention_bytes(config, prefill_tokens(config, options.context), options.context, dtype.itemsize)
    expanded = 0 if opened.linears is None else expansion_bytes(model, opened.linears)
    return Needs(
        process_bytes=opened.process_bytes,
        weight_bytes=weight_bytes(model),
        kv_bytes=options.context * kv_bytes_per_token(config, dtype.itemsize),
        activation_bytes=4 * vocabulary * 4 + rows * width * dtype.itemsize * 8 + expanded + scores,
        staging_bytes=options.io_threads * READ_BYTES + room_bytes(opened.forms),
    )
