"""Dense models as mixtures of one expert, and back: the last layer's feed-forward is an expert, the others stay dense.

The router has one choice, so its weight is 1 and its gradient 0. The model computes what the dense one computes.

Shapes: D model width, F hidden width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ...parts.config import MoEConfig
from ..families import config_of_dense

DENSE_MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, "none"),
    "mistral": (MistralForCausalLM, MistralConfig, "none"),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, "none"),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, "head"),
}
"""Per family its model, its config, and which norm of queries and keys it has."""


def one_expert_config(config: Any) -> MoEConfig:
    """A dense config as one of ours. Raises ValueError if our decoder cannot express it."""
    ours = config_of_dense(config)
    ours.num_dense_layers = ours.num_hidden_layers - 1
    ours.num_experts = ours.num_experts_per_tok = 1
    ours.moe_intermediate_size = ours.intermediate_size
    ours.router = "olmoe"
    ours.balance_loss_weight = ours.z_loss_weight = 0.0  # there is nothing to balance
    return ours


def one_expert_state(state: dict[str, Tensor], config: MoEConfig) -> dict[str, Tensor]:
    """A dense model's tensors under our names; those of the last layer's feed-forward become a bank of one expert."""
    found, prefix = dict(state), _last(config)
    gate_FD, up_FD, down_DF = (found.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down"))
    found[f"{prefix}experts.gate_up_proj"] = torch.cat([gate_FD, up_FD])[None]
    found[f"{prefix}experts.down_proj"] = down_DF[None]
    found[f"{prefix}router.weight"] = torch.zeros(1, config.hidden_size, dtype=gate_FD.dtype)
    return found


def dense_state(state: dict[str, Tensor], config: MoEConfig) -> dict[str, Tensor]:
    """Inverse of `one_expert_state`."""
    found, prefix = dict(state), _last(config)
    gate_FD, up_FD = found.pop(f"{prefix}experts.gate_up_proj")[0].chunk(2)
    found[f"{prefix}down_proj.weight"] = found.pop(f"{prefix}experts.down_proj")[0]
    found |= {f"{prefix}gate_proj.weight": gate_FD, f"{prefix}up_proj.weight": up_FD}
    del found[f"{prefix}router.weight"]
    return found


def dense_obstacles(config: MoEConfig, family: str) -> list[str]:
    """Why a model of ours is no dense model of a family; empty if it is one."""
    found = []
    if (config.num_experts, config.num_experts_per_tok) != (1, 1):
        found.append(f"it has {config.num_experts} experts, of which a token visits {config.num_experts_per_tok}")
    if config.num_moe_layers != 1 or config.moe_intermediate_size != config.intermediate_size:
        found.append("only a last layer with one expert as wide as the dense layers stands for a dense one")
    needed = DENSE_MODELS[family][2]
    if config.qk_norm != needed:
        found.append(f"qk_norm must be {needed!r}, it is {config.qk_norm!r}")
    if config.qkv_bias != (family == "qwen2"):
        found.append(f"qkv_bias must be {family == 'qwen2'}, it is {config.qkv_bias}")
    return found


def dense_config(config: MoEConfig, shared: dict[str, Any], family: str) -> Any:
    """The config of a dense family, from the fields that all families share."""
    fields = {name: value for name, value in shared.items() if name != "num_experts_per_tok"}
    made = DENSE_MODELS[family][1](**fields, head_dim=config.head_dim, intermediate_size=config.intermediate_size)
    if family == "mistral":
        made.sliding_window = None
    return made


def _last(config: MoEConfig) -> str:
    return f"model.layers.{config.num_hidden_layers - 1}.mlp."
