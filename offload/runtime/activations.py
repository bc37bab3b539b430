"""What a prompt's activations take: upper bounds from the sizes that configs share, without a name of a family.

Counts of arrays are those that were seen alive at once in transformers 5.23 on the CPU (glibc's allocator included),
for every family of `tests/test_offload_families.py` that runs at hidden size 256 and 512 to 2,048 tokens.
"""

from typing import Any

from routing.ground.model_config import text_config

MOST_PIECE_BYTES = 1 << 30
"""Attention scores or scans of one layer, above which a prompt is read in pieces. Smaller pieces read nearly all
experts again for each. 64 heads of 2,048 tokens would take 3.2 GB, and are read in four pieces of 0.8 GB."""
LEAST_PIECE = 128  # smaller pieces read nearly all experts again for each; not tuned
SCORE_BYTES = 12
"""Per head, query and key, with numbers of two bytes: what `eager` attention holds at once (product, scaled, masked,
shifted, normalised, a copy for the values); torch's own unfused one takes 10 to 11."""
BIAS_BYTES = 8
"""Likewise, besides: a bias by relative position, gathered, masked, and added to the mask."""
MASK_BYTES = 8
"""Per query and key: masks of full and of sliding attention, as flags and in the model's dtype."""
DELTA_CHUNK, LINEAR_CHUNK = 64, 256
"""Tokens of a chunk where the config names none: of the gated delta rule, and of lightning attention and Mamba-2."""
STREAM_ARRAYS = 4
"""Of hyper-connections, which carry several residual streams: read, mixed, written; model's dtype and float32."""
CHANNEL_DECAYS = 3
"""Where each channel of a head decays at a rate of its own, arrays of a chunk's pairs of tokens and their channels."""
LOGIT_BYTES = 48
"""Per entry of the vocabulary, for one position: bfloat16, float32, and the sorted copies and indices of top-p."""


def activation_bytes(config: Any, tokens: int, context: int, top_k: int, item_bytes: int) -> int:
    """What one layer holds at once while `tokens` of a sequence pass, and the logits of the last of them.

    Args:
        config: the model's; only sizes are read.
        tokens: computed at once, >= 1.
        context: keys that they attend to, >= `tokens`.
        top_k: experts per token.
        item_bytes: bytes of one activation.
    """
    text = text_config(config)
    width = _size(text, "hidden_size")
    # residuals, norms in float32, projections; then rows, products and results of each token's experts
    rows = tokens * (_widest(text) * (16 * item_bytes + 16) + 8 * top_k * width * item_bytes)
    rows += tokens * _size(text, "hc_mult", "hc_count") * width * STREAM_ARRAYS * (item_bytes + 4)
    return rows + _layer_bytes(text, tokens, context, item_bytes) + LOGIT_BYTES * _size(text, "vocab_size")


def attention_bytes(config: Any, tokens: int, context: int, item_bytes: int) -> int:
    """Masks of attention, scores where these are written to memory, and scores of an index of keys."""
    text = text_config(config)
    per_score = SCORE_BYTES if _keeps_scores(text) else 0
    per_score += BIAS_BYTES if _size(text, "rel_extent") else 0
    scores = _most_heads(text) * per_score * item_bytes // 2
    index_heads = _size(text, "index_n_heads", "indexer_n_heads")
    return tokens * context * (MASK_BYTES + scores + index_heads * (2 * item_bytes + 4))


def _keeps_scores(config: Any) -> bool:
    """Whether attention writes its scores to memory: all but torch's fused one, which wants values as wide as keys."""
    if getattr(config, "_attn_implementation", None) == "eager":
        return True
    value = _size(config, "v_head_dim")
    key = _size(config, "qk_head_dim", "head_dim")
    if rope := _size(config, "qk_rope_head_dim"):
        key = _size(config, "qk_nope_head_dim") + rope
    return bool(value) and value != key


def _most_heads(config: Any) -> int:
    """Query heads of the layer that has most of them: some configs have a number for each kind or each layer."""
    names = [name for name in vars(config) if "num_attention_heads" in name]
    return max(_size(config, name) for name in ("num_attention_heads", *names))


def scan_bytes(config: Any, tokens: int) -> int:
    """What a layer of linear attention or a state-space layer holds, in float32; 0 without such a layer."""
    text = text_config(config)
    kinds = set(getattr(text, "layer_types", None) or ())
    state = _size(text, "ssm_state_size", "mamba_d_state")
    heads, chunk, width, pair = 0, _size(text, "mamba_chunk_size", "chunk_size") or LINEAR_CHUNK, 0, 5
    if value_heads := _size(text, "linear_num_value_heads"):
        heads, chunk = value_heads, DELTA_CHUNK
        width = _size(text, "linear_key_head_dim") + _size(text, "linear_value_head_dim")
    elif value_heads := _size(text, "linear_num_heads"):
        heads, chunk, width = value_heads, DELTA_CHUNK, 2 * _size(text, "linear_head_dim")
        pair += CHANNEL_DECAYS * _size(text, "linear_head_dim")
    elif mamba_heads := _size(text, "mamba_num_heads", "mamba_n_heads"):
        heads, width = mamba_heads, state + _size(text, "mamba_head_dim", "mamba_d_head")
    elif state:  # Mamba-1 has a state for each channel instead of heads
        return tokens * 4 * 4 * _size(text, "mamba_expand") * _size(text, "hidden_size") * state
    elif "linear_attention" in kinds:
        heads = _size(text, "num_attention_heads")
        width = 2 * (_size(text, "head_dim") or _size(text, "hidden_size") // max(heads, 1))
    padded = -(-tokens // chunk) * chunk
    return padded * heads * (10 * width + pair * chunk) * 4


def prefill_tokens(config: Any, context: int) -> int:
    """Tokens of a prompt that are computed at once, so that scores and scans stay below MOST_PIECE_BYTES."""
    tokens = context
    while tokens > LEAST_PIECE and _layer_bytes(config, tokens, context, 2) > MOST_PIECE_BYTES:
        tokens = -(-tokens // 2)
    return tokens


def _layer_bytes(config: Any, tokens: int, context: int, item_bytes: int) -> int:
    """What one layer's attention, or its scan, holds: a layer has one of them."""
    return max(attention_bytes(config, tokens, context, item_bytes), scan_bytes(config, tokens))


def _widest(config: Any) -> int:
    """The widest row of a token outside its routed experts: hidden state, queries, or a dense feed-forward layer."""
    dense = ("intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size")
    queries = _most_heads(config) * max(_size(config, "head_dim"), _size(config, "swa_head_dim"))
    return max(_size(config, "hidden_size"), queries, *(_size(config, name) for name in dense))


def _size(config: Any, *names: str) -> int:
    """The first of these sizes that a config has, 0 without one; the largest where layers differ."""
    layers = [config]
    if getattr(config, "is_heterogeneous", False):
        layers = [config.per_layer_config[layer] for layer in range(int(config.num_hidden_layers))]
    for name in names:
        found = [value for layer in layers if (value := getattr(layer, name, None))]
        sizes = [size for value in found for size in (value if isinstance(value, list | tuple) else [value])]
        if sizes:
            return max(map(int, sizes))
    return 0
