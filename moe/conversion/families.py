"""Configs of transformers' own families as ours: the inverse of `moe.export`, and which models have none and why."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from ..parts.config import MoEConfig

COPIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def config_of_moe(config: PreTrainedConfig) -> MoEConfig:
    """A mixture-of-experts config of another family, or of ours, as one of ours.

    Raises:
        ValueError: if our decoder cannot express the model; the message lists every reason.
    """
    if isinstance(config, MoEConfig):
        if config.architecture != "moe":
            raise ValueError(
                f"this model is already another architecture ({config.architecture}); convert one with plain experts"
            )
        return config
    return _ours(config, MOE_FAMILIES, "mixture-of-experts")


def config_of_dense(config: PreTrainedConfig) -> MoEConfig:
    """A dense Llama-type config as one of ours, every layer dense but the last (which a caller replaces).

    Raises:
        ValueError: if our decoder cannot express the model; the message lists every reason.
    """
    return _ours(config, DENSE_FAMILIES, "dense")


def _ours(config: PreTrainedConfig, families: dict[str, Callable[[Any], dict[str, Any]]], kind: str) -> MoEConfig:
    family = families.get(config.model_type)
    obstacles = _obstacles(config)
    if family is None:
        known = f"known {kind} families are {', '.join(families)}"
        reasons = f" ({'; '.join(obstacles)})" if obstacles else ""
        raise ValueError(f"{config.model_type} models cannot be expressed{reasons}; {known}")
    if obstacles:
        raise ValueError(f"this {config.model_type} model cannot be expressed: {'; '.join(obstacles)}")
    heads = config.num_attention_heads
    rope = config.rope_parameters or {}
    return MoEConfig(
        **{name: getattr(config, name) for name in COPIED},
        num_key_value_heads=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        rope_theta=rope.get("rope_theta", 10_000.0),
        dtype=config.dtype,
        **family(config),
    )


def _obstacles(config: Any) -> list[str]:
    """Everything in a config that our decoder has no place for."""
    found = [f"it has biases ({name})" for name in ("attention_bias", "mlp_bias") if getattr(config, name, False)]
    if getattr(config, "kv_lora_rank", None):
        found.append("its attention is multi-head latent attention")
    if getattr(config, "sliding_window", None):
        found.append(f"its attention slides over a window of {config.sliding_window}")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        found.append(f"it has layers of other kinds ({', '.join(sorted(kinds))})")
    if getattr(config, "clip_qkv", None):
        found.append(f"it clips queries, keys and values at {config.clip_qkv}")
    if getattr(config, "n_shared_experts", None) or getattr(config, "shared_expert_intermediate_size", None):
        found.append("its shared experts are of another kind")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        found.append(f"its rotary positions are scaled ({rope['rope_type']})")
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        found.append(f"only a part of each head is rotated ({rope['partial_rotary_factor']})")
    if getattr(config, "quantization_config", None) is not None:
        found.append("its weights are quantised; save a dequantised copy first")
    return found


def _experts(config: Any, width: int, router: str) -> dict[str, Any]:
    return {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": width,
        "router": router,
    }


def _softmax_router(config: Any) -> str:
    return "qwen3_moe" if config.norm_topk_prob else "olmoe"


def _olmoe(config: Any) -> dict[str, Any]:
    return {"qk_norm": "full", **_experts(config, config.intermediate_size, _softmax_router(config))}


def _mixtral(config: Any) -> dict[str, Any]:
    return {"qk_norm": "none", **_experts(config, config.intermediate_size, "mixtral")}


def _qwen3_moe(config: Any) -> dict[str, Any]:
    dense = sorted(config.mlp_only_layers or [])
    if dense != list(range(len(dense))) or config.decoder_sparse_step != 1:
        raise ValueError(
            f"only the first layers may be dense; this model has mlp_only_layers={dense}, "
            f"decoder_sparse_step={config.decoder_sparse_step}"
        )
    return {
        "qk_norm": "head",
        "num_dense_layers": len(dense),
        "intermediate_size": config.intermediate_size,
        **_experts(config, config.moe_intermediate_size, _softmax_router(config)),
    }


def _llama(config: Any) -> dict[str, Any]:
    return {"qk_norm": "none", "intermediate_size": config.intermediate_size}


def _qwen2(config: Any) -> dict[str, Any]:
    return {"qk_norm": "none", "qkv_bias": True, "intermediate_size": config.intermediate_size}


def _qwen3(config: Any) -> dict[str, Any]:
    return {"qk_norm": "head", "intermediate_size": config.intermediate_size}


MOE_FAMILIES = {"olmoe": _olmoe, "qwen3_moe": _qwen3_moe, "mixtral": _mixtral}
DENSE_FAMILIES = {"llama": _llama, "mistral": _llama, "qwen2": _qwen2, "qwen3": _qwen3}
