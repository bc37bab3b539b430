"""A dense Llama-type model cut into experts and a permanent part, as a model of ours with one router for all layers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...model.decoder import MoEForCausalLM
from ...parts.config import MoEConfig
from ..families import config_of_dense
from .domain_masks import LayerSlices


def sliced_model(dense: Any, slices: Sequence[LayerSlices], router_options: dict[str, int]) -> MoEForCausalLM:
    """The model before any training: what a token computes is its domain's masked dense model; its router is untrained.

    Args:
        dense: a transformers model of a dense family.
        slices: per layer.
        router_options: sizes of the router, options of the architecture `readme`.

    Raises:
        ValueError: if our decoder cannot express the model.
    """
    config = _config(dense.config, slices, router_options)
    model = MoEForCausalLM(config).to(dense.dtype).eval()
    state = model.state_dict()
    for name, value in dense.state_dict().items():
        if name in state:
            state[name] = value
    for number, (cut, layer) in enumerate(zip(slices, dense.model.layers, strict=True)):
        prefix = f"model.layers.{number}.mlp."
        gate_FD, up_FD, down_DF = (
            getattr(layer.mlp, f"{name}_proj").weight.detach() for name in ("gate", "up", "down")
        )
        state[prefix + "experts.gate_up_proj"] = torch.stack([torch.cat([gate_FD[i], up_FD[i]]) for i in cut.experts])
        state[prefix + "experts.down_proj"] = torch.stack([down_DF[:, i] for i in cut.experts])
        if len(cut.permanent):
            state[prefix + "permanent.gate_proj.weight"] = gate_FD[cut.permanent]
            state[prefix + "permanent.up_proj.weight"] = up_FD[cut.permanent]
            state[prefix + "permanent.down_proj.weight"] = down_DF[:, cut.permanent]
    model.load_state_dict(state)
    _start_router(model, dense.get_input_embeddings())
    return model


def storage(dense_width: int, slices: Sequence[LayerSlices]) -> dict[str, Any]:
    """Feed-forward channels: stored, computed per token, and held more than once, against the dense model's."""
    stored = [len(cut.permanent) + sum(len(expert) for expert in cut.experts) for cut in slices]
    active = [len(cut.permanent) + len(cut.experts[0]) for cut in slices]
    distinct = [int(cut.is_kept_EF.any(dim=0).sum()) for cut in slices]
    dense = dense_width * len(slices)
    return {
        "expert_widths": [len(cut.experts[0]) for cut in slices],
        "permanent_widths": [len(cut.permanent) for cut in slices],
        "stored_of_dense": sum(stored) / dense,
        "active_of_dense": sum(active) / dense,
        "distinct_of_dense": sum(distinct) / dense,
    }


def _config(dense: Any, slices: Sequence[LayerSlices], router_options: dict[str, int]) -> MoEConfig:
    config = config_of_dense(dense)
    widths = storage(config.intermediate_size, slices)
    settings = config.to_dict() | {
        "architecture": "readme",
        "architecture_options": {
            "expert_widths": widths["expert_widths"],
            "permanent_widths": widths["permanent_widths"],
            **router_options,
        },
        "num_experts": len(slices[0].experts),
        "num_experts_per_tok": 1,
        "moe_intermediate_size": max(widths["expert_widths"]),
        "balance_loss_weight": 0.0,
        "z_loss_weight": 0.0,
    }
    return MoEConfig(**{name: value for name, value in settings.items() if name != "model_type"})


@torch.no_grad()
def _start_router(model: MoEForCausalLM, embedding: nn.Module) -> None:
    """The router's embedding starts as the first columns of the model's, as in the released code."""
    target: Tensor = model.model.moe_layers[0].router.core.embed_tokens.weight
    width = min(target.shape[1], embedding.weight.shape[1])
    target[:, :width] = embedding.weight[:, :width]
