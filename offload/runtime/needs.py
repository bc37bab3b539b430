"""What the process needs in memory besides expert slots."""

import torch

from routing.ground.model_config import text_config

from ..compute.resident import expansion_bytes, weight_bytes
from ..memory.budget import Needs, kv_bytes_per_token
from ..ram.expanded import room_bytes
from ..store.store import READ_BYTES
from .opening import OpenedCheckpoint
from .options import LoadOptions


def memory_needs(opened: OpenedCheckpoint, options: LoadOptions) -> Needs:
    """The parts of a budget that are not expert slots, with `options.context` tokens of KV cache."""
    config, model = opened.config, opened.model
    text = text_config(config)
    width, vocabulary = int(getattr(text, "hidden_size", 0) or 0), int(getattr(text, "vocab_size", 0) or 0)
    dtype: torch.dtype = model.dtype
    rows = options.context * opened.top_k
    expanded = 0 if opened.linears is None else expansion_bytes(model, opened.linears)
    return Needs(
        process_bytes=opened.process_bytes,
        weight_bytes=weight_bytes(model),
        kv_bytes=options.context * kv_bytes_per_token(config, dtype.itemsize),
        activation_bytes=4 * vocabulary * 4 + rows * width * dtype.itemsize * 8 + expanded,
        staging_bytes=options.io_threads * READ_BYTES + room_bytes(opened.forms),
    )
