"""Export a model of ours to a native family of transformers, so that other engines load it unchanged."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from routing import ClassicRouter, ClassicRule
from routing.ground.expect import expect_name

from ..model.decoder import MoEForCausalLM
from ..parts.config import MoEConfig
from .adoption.one_expert import DENSE_MODELS, dense_config, dense_obstacles, dense_state
from .same_function import expect_same_function


def export(model: MoEForCausalLM, family: str) -> PreTrainedModel:
    """The same function as a model of another family; `save_pretrained` then writes its checkpoint.

    Its logits on a few tokens are compared with the source's before it is returned.

    Args:
        model: a model of ours with the architecture `moe`, whose router is a plain softmax top-k one.
        family: a key of `FAMILIES`.

    Returns:
        A model of transformers' own class with the same weights and dtype.

    Raises:
        ValueError: if the family cannot express this model (the message lists every reason), or the logits differ.
    """
    expect_name(family, FAMILIES, "family")
    if model.config.architecture != "moe":
        raise ValueError(
            f"the architecture {model.config.architecture!r} has no equal in transformers; only plain mixtures of "
            "experts (architecture 'moe') are exported"
        )
    rule = _plain_rule(model)
    model_class, convert, find_obstacles = FAMILIES[family]
    obstacles = [*_common_obstacles(model.config), *find_obstacles(model.config, rule)]
    if obstacles:
        raise ValueError(f"{family} cannot express this model: {'; '.join(obstacles)}")
    with torch.device("meta"):
        exported = model_class(convert(model.config, rule))
    state = dense_state(model.state_dict(), model.config) if family in DENSE_MODELS else _renamed(model.state_dict())
    exported.load_state_dict(state, assign=True)
    exported.tie_weights()
    # rotary frequencies are in no checkpoint, so on the meta device they were not computed
    exported.model.rotary_emb = type(exported.model.rotary_emb)(exported.config).to(model.device)
    exported.generation_config = model.generation_config
    was_training = model.training
    expect_same_function(model.eval(), exported.eval(), f"the {family} model")
    model.train(was_training)
    return exported


def _plain_rule(model: MoEForCausalLM) -> ClassicRule:
    router = model.model.moe_layers[0].router
    if type(router) is not ClassicRouter:
        raise ValueError(f"only the classic routers have a native family; this model has {type(router).__name__}")
    rule = router.rule
    score, scale = rule.scoring.score, rule.scoring.scale
    num_groups, bias_rate = rule.grouping.num_groups, rule.balance.bias_rate
    if score == "sigmoid" or num_groups > 1 or bias_rate or scale != 1.0:
        raise ValueError(
            "olmoe, qwen3_moe and mixtral route by softmax without groups, balancing bias or scale; "
            f"this model has score={score}, num_groups={num_groups}, bias_rate={bias_rate}, scale={scale}"
        )
    return rule


def _common_obstacles(config: MoEConfig) -> list[str]:
    found = []
    if config.num_shared_experts:
        found.append("it has shared experts")
    if config.zero_compute_experts:
        found.append("it has zero-compute experts")
    return found


def _attention_obstacles(config: MoEConfig, qk_norm: str) -> list[str]:
    found = [] if config.qk_norm == qk_norm else [f"qk_norm must be {qk_norm!r}, it is {config.qk_norm!r}"]
    return [*found, "its queries, keys and values have biases"] if config.qkv_bias else found


def _expect_no_dense_layers(config: MoEConfig) -> list[str]:
    return [f"it has {config.num_dense_layers} dense layers"] if config.num_dense_layers else []


def _is_renormalised(rule: ClassicRule) -> bool:
    return rule.scoring.is_normalised


def _olmoe_obstacles(config: MoEConfig, rule: ClassicRule) -> list[str]:
    found = [*_attention_obstacles(config, "full"), *_expect_no_dense_layers(config)]
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        found.append(f"heads x head_dim must equal hidden_size {config.hidden_size}")
    return found


def _qwen3_moe_obstacles(config: MoEConfig, rule: ClassicRule) -> list[str]:
    return _attention_obstacles(config, "head")


def _mixtral_obstacles(config: MoEConfig, rule: ClassicRule) -> list[str]:
    found = [*_attention_obstacles(config, "none"), *_expect_no_dense_layers(config)]
    if not _is_renormalised(rule):
        found.append("its router does not renormalise the selected weights")
    return found


def _shared_fields(config: MoEConfig) -> dict[str, Any]:
    names = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "num_experts_per_tok",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "dtype",
    )
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    return {name: getattr(config, name) for name in names} | {"rope_parameters": rope}


def _to_olmoe(config: MoEConfig, rule: ClassicRule) -> OlmoeConfig:
    return OlmoeConfig(
        **_shared_fields(config),
        num_experts=config.num_experts,
        intermediate_size=config.moe_intermediate_size,
        norm_topk_prob=_is_renormalised(rule),
    )


def _to_qwen3_moe(config: MoEConfig, rule: ClassicRule) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **_shared_fields(config),
        head_dim=config.head_dim,
        num_experts=config.num_experts,
        intermediate_size=config.intermediate_size,
        moe_intermediate_size=config.moe_intermediate_size,
        norm_topk_prob=_is_renormalised(rule),
        mlp_only_layers=list(range(config.num_dense_layers)),
    )


def _to_mixtral(config: MoEConfig, rule: ClassicRule) -> MixtralConfig:
    return MixtralConfig(
        **_shared_fields(config),
        head_dim=config.head_dim,
        num_local_experts=config.num_experts,
        intermediate_size=config.moe_intermediate_size,
    )


def _to_dense(config: MoEConfig, rule: ClassicRule, family: str) -> Any:
    return dense_config(config, _shared_fields(config), family)


def _dense_obstacles(config: MoEConfig, rule: ClassicRule, family: str) -> list[str]:
    return dense_obstacles(config, family)


def _renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of the native families; what only training computes is left out."""
    return {
        name.replace(".mlp.router.", ".mlp.gate."): tensor
        for name, tensor in state.items()
        if not name.startswith("mtp.")
    }


Convert = Callable[[MoEConfig, ClassicRule], Any]
FindObstacles = Callable[[MoEConfig, ClassicRule], list[str]]

FAMILIES: dict[str, tuple[type[PreTrainedModel], Convert, FindObstacles]] = {
    "olmoe": (OlmoeForCausalLM, _to_olmoe, _olmoe_obstacles),
    "qwen3_moe": (Qwen3MoeForCausalLM, _to_qwen3_moe, _qwen3_moe_obstacles),
    "mixtral": (MixtralForCausalLM, _to_mixtral, _mixtral_obstacles),
} | {
    family: (kind, partial(_to_dense, family=family), partial(_dense_obstacles, family=family))
    for family, (kind, _, _) in DENSE_MODELS.items()
}
