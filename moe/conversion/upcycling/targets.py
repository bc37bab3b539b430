"""The families that a dense model can become without changing what it computes, and how each names its tensors."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from routing.ground.expect import expect_name

from ...model.decoder import MoEForCausalLM
from ...parts.config import MoEConfig
from ..families import config_of_dense

SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
    "use_cache",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
)
IDLE_WIDTH = 8
"""Of the shared expert that qwen2_moe must have: it starts with a down projection of zeros and adds nothing. The
narrowest that grouped matrix products take in bfloat16 (16 bytes)."""


@dataclass(frozen=True, kw_only=True)
class ExpertSizes:
    """Experts of the model to be written.

    Args:
        num_experts: E, shards of copies counted one by one.
        top_k: K, experts per token.
        width: F of one expert.
    """

    num_experts: int
    top_k: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Target:
    """A family with experts.

    Args:
        model_class: its causal language model.
        config: config of the dense model, sizes -> config of the new one.
        block: prefix of the feed-forward of a layer; `{layer}` stands for its number.
        router: name of the router's weight in the block.
        matrices: names of each expert's gate, up and down projection, or None where experts lie in one tensor.
        has_shared_expert: whether each layer must have a shared expert with a gate of its own.
    """

    model_class: type[PreTrainedModel]
    config: Callable[[Any, ExpertSizes], PreTrainedConfig]
    block: str = "model.layers.{layer}.mlp."
    router: str = "gate.weight"
    matrices: tuple[str, str, str] | None = ("gate_proj", "up_proj", "down_proj")
    has_shared_expert: bool = False


def target_of(config: PreTrainedConfig, name: str) -> tuple[str, Target]:
    """The family to write, by name, or the one that is made for this kind of dense model (`auto`).

    Raises:
        ValueError: if the family is unknown, or cannot express the model; the message says why.
    """
    expect_name(name, ("auto", *TARGETS), "family (--to)")
    natural = NATURAL.get(config.model_type)
    if natural is None:
        raise ValueError(f"{config.model_type} models cannot be upcycled; known dense families: {', '.join(NATURAL)}")
    if name not in ("auto", natural, "expertier"):
        raise ValueError(
            f"a {config.model_type} model becomes {natural} or expertier, which compute the same; not {name}"
        )
    if obstacles := list(_obstacles(config)):
        raise ValueError(f"this {config.model_type} model cannot be upcycled: {'; '.join(obstacles)}")
    chosen = natural if name == "auto" else name
    return chosen, TARGETS[chosen]


def _obstacles(config: Any) -> Iterator[str]:
    if getattr(config, "quantization_config", None) is not None:
        yield "its weights are quantised; write a plain copy first (expertier dequantise)"
    if getattr(config, "mlp_bias", False):
        yield "its feed-forwards have biases"
    if getattr(config, "attention_bias", False) and config.model_type != "qwen3":
        yield "its attention has biases, which mixtral has no place for"
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        yield "some of its layers attend to a window only"


def _shared(config: Any) -> dict[str, Any]:
    fields = {name: getattr(config, name) for name in SHARED_FIELDS if hasattr(config, name)}
    if getattr(config, "head_dim", None) is not None:
        fields["head_dim"] = config.head_dim
    return fields


def _mixtral(config: Any, sizes: ExpertSizes) -> MixtralConfig:
    return MixtralConfig(
        **_shared(config),
        sliding_window=getattr(config, "sliding_window", None),
        intermediate_size=sizes.width,
        num_local_experts=sizes.num_experts,
        num_experts_per_tok=sizes.top_k,
    )


def _qwen_fields(config: Any, sizes: ExpertSizes) -> dict[str, Any]:
    return _shared(config) | {
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": sizes.width,
        "num_experts": sizes.num_experts,
        "num_experts_per_tok": sizes.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen3_moe(config: Any, sizes: ExpertSizes) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(**_qwen_fields(config, sizes), attention_bias=config.attention_bias)


def _qwen2_moe(config: Any, sizes: ExpertSizes) -> Qwen2MoeConfig:
    return Qwen2MoeConfig(**_qwen_fields(config, sizes), qkv_bias=True, shared_expert_intermediate_size=IDLE_WIDTH)


def _expertier(config: Any, sizes: ExpertSizes) -> MoEConfig:
    settings = config_of_dense(config).to_dict() | {
        "num_experts": sizes.num_experts,
        "num_experts_per_tok": sizes.top_k,
        "moe_intermediate_size": sizes.width,
        "router": "qwen3_moe" if config.model_type == "qwen3" else "mixtral",
    }
    return MoEConfig(**{name: value for name, value in settings.items() if name != "model_type"})


TARGETS = {
    "mixtral": Target(
        model_class=MixtralForCausalLM,
        config=_mixtral,
        block="model.layers.{layer}.block_sparse_moe.",
        matrices=("w1", "w3", "w2"),
    ),
    "qwen2_moe": Target(model_class=Qwen2MoeForCausalLM, config=_qwen2_moe, has_shared_expert=True),
    "qwen3_moe": Target(model_class=Qwen3MoeForCausalLM, config=_qwen3_moe),
    "expertier": Target(model_class=MoEForCausalLM, config=_expertier, router="router.weight", matrices=None),
}
NATURAL = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
