"""The config of a model of which there is only a GGUF file: from its metadata, by transformers' own table of keys.

transformers' own function for this reads the file with the reader of the `gguf` package, which trusts every count and
takes seconds for a large vocabulary. Its table also lacks the width of experts, which is read here.
"""

from collections.abc import Mapping
from typing import Any

from .architectures import MODEL_TYPES, expect_architecture
from .head import GgufHead

DTYPES = {("F32",): "float32", ("F16",): "float16", ("F16", "F32"): "float16"}
"""Kinds of matrices in a file -> the dtype to run in; all others run in bfloat16."""
OWN_KEYS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""What transformers' table lacks; a value that the config class has no field for is left out."""
ROPE_SCALINGS = ("linear", "yarn")
READ_ELSEWHERE = (
    *("vocab_size", "expert_count", "expert_used_count", "expert_gating_func", "feed_forward_length"),
    *("rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length"),
)
CHANGES_NOTHING = ("attention.value_length", "rope.dimension_count", "expert_shared_count", "nextn_predict_layers")
"""Keys that say again what the tensors or other keys say, for every architecture that transformers has a table of."""


def config_of(head: GgufHead) -> Any:
    """A transformers config.

    Raises:
        ValueError: if the architecture is unknown, or transformers cannot make a config of what the file says.
    """
    from transformers import AutoConfig
    from transformers.integrations import GGUF_CONFIG_MAPPING

    expect_architecture(head.file, head.architecture)
    kind = _model_type(head)
    keys = GGUF_CONFIG_MAPPING.get("minimax_m2" if kind == "minimax_m2" else MODEL_TYPES.get(head.architecture, kind))
    keys = keys or GGUF_CONFIG_MAPPING.get(head.architecture)
    if keys is None:
        raise ValueError(
            f"{head.file}: transformers makes no config of a {head.architecture} file; "
            "put the model's config.json and tokenizer beside it"
        )
    _expect_all_understood(head, keys)
    described = {ours: head.own(theirs) for theirs, ours in keys.items() if ours not in (None, -1)}
    described = {name: _plain(value) for name, value in described.items() if value is not None}
    try:
        fields = AutoConfig.for_model(kind).to_dict()
        described |= _own_values(head, kind, fields)
        return AutoConfig.for_model(kind, **described)
    except Exception as error:  # each config class checks its own fields, and raises what it likes
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{head.file}: its metadata do not describe a {kind} ({reason[:300]})") from error


def _expect_all_understood(head: GgufHead, keys: Mapping[str, Any]) -> None:
    """Refuse a file that says something of the model that would not reach its config: a window, a scale, a cap."""
    known = {*keys, *OWN_KEYS, *READ_ELSEWHERE, *CHANGES_NOTHING}
    prefix = f"{head.architecture}."
    for key in sorted(head.metadata):
        if key.startswith(prefix) and key.removeprefix(prefix) not in known:
            raise ValueError(
                f"{head.file}: it says {key}, which transformers makes nothing of; "
                "put the model's config.json and tokenizer beside it"
            )


def dtype_of(head: GgufHead) -> str:
    """The dtype in which to run a model whose config names none: its own where matrices are stored plainly."""
    matrices = tuple(sorted({entry.dtype for entry in head.entries.values() if len(entry.shape) > 1}))
    return DTYPES.get(matrices, "bfloat16")


def _model_type(head: GgufHead) -> str:
    if head.architecture == "llama" and head.own("expert_count"):
        return "mixtral"
    return MODEL_TYPES.get(head.architecture, head.architecture)


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _own_values(head: GgufHead, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """What the table of transformers does not say, for a config class that has these `fields`."""
    found: dict[str, Any] = {name: head.own(key) for key, name in OWN_KEYS.items() if name in fields}
    width = head.own("expert_feed_forward_length")
    if "moe_intermediate_size" not in fields and width:
        found["intermediate_size"] = width
    if kind == "mixtral":
        found |= {"num_local_experts": head.own("expert_count"), "num_experts_per_tok": head.own("expert_used_count")}
    if kind == "qwen3_moe":
        found["norm_topk_prob"] = True  # llama.cpp always does for this architecture; the class says no by default
    if kind == "minimax_m2":
        found |= {
            "use_routing_bias": True,
            "scoring_func": {1: "softmax", 2: "sigmoid"}.get(head.own("expert_gating_func")),
        }
    for name in ("bos", "eos", "padding"):
        found[f"{name.removesuffix('ding')}_token_id"] = head.metadata.get(f"tokenizer.ggml.{name}_token_id")
    embedding = head.entries.get("token_embd.weight")
    if embedding is not None:
        found["vocab_size"] = embedding.shape[0]
    found["tie_word_embeddings"] = "output.weight" not in head.entries
    found["dtype"] = dtype_of(head)
    found |= _rope(head, fields)
    return {name: _plain(value) for name, value in found.items() if value is not None}


def _rope(head: GgufHead, fields: dict[str, Any]) -> dict[str, Any]:
    """How positions are stretched, where the file says so."""
    kind = head.own("rope.scaling.type")
    if kind not in ROPE_SCALINGS:
        return {}
    before = fields.get("rope_parameters") or {}
    said = {
        "rope_type": kind,
        "rope_theta": head.own("rope.freq_base"),
        "factor": head.own("rope.scaling.factor"),
        "original_max_position_embeddings": head.own("rope.scaling.original_context_length"),
    }
    same = before if before.get("rope_type") == kind else {}
    return {"rope_parameters": {**same, **{name: value for name, value in said.items() if value is not None}}}
