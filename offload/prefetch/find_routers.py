"""Finds the router beside each experts module, so that the next layer's choice can be guessed, for any family."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..checkpoint.experts import ExpertLayer
from .lookahead import ExactPlan, holds_experts
from .pass_predictor import PassPredictor, PassPrefetcher
from .predictor import TrainedPredictor, read_predictor
from .prefetch import GatePredictor, Predictor, Prefetcher, TransitionPredictor

MOST_AHEAD = 2
"""Experts of one layer that may be on their way before it asks. More take slots of experts that are needed soon. 2 was
measured (experiments/records/2026-11-21_offload-speed: +2 to +14 % in four pairs); other values have no record."""


def make_prefetcher(name: str, model: nn.Module, layers: Sequence[ExpertLayer], top_k: int) -> Prefetcher | None:
    """The prefetcher of this name, or of this file with a trained predictor, for a model; None for `off`.

    `auto` is the exact plan where routers hold experts, and else nothing.
    """
    predictor: Predictor
    if name == "plan" or (name == "auto" and holds_experts(model)):
        return ExactPlan()
    if name == "gate":
        predictor = GatePredictor([router_of(model, layer) for layer in layers], top_k)
    elif name == "transitions":
        predictor = TransitionPredictor(len(layers), max(layer.num_experts for layer in layers), top_k)
    elif name in ("off", "auto"):
        return None
    else:
        return _of_file(name, len(layers), max(layer.num_experts for layer in layers), min(MOST_AHEAD, top_k))
    return Prefetcher(predictor, min(MOST_AHEAD, top_k))


def _of_file(file: str, num_layers: int, num_experts: int, most: int) -> Prefetcher:
    """The prefetcher of a file of `trace predictor`: of whole passes, or of the next two layers."""
    stored = read_predictor(file)
    routed = TrainedPredictor.of_arrays(file, stored).expect(num_layers, num_experts)
    if "pass_sizes" not in stored:
        return Prefetcher(routed, most)
    return PassPrefetcher(PassPredictor.of_arrays(file, stored, routed), most)


def router_of(model: nn.Module, layer: ExpertLayer) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight `[E, D]` and selection bias `[E]` of the router beside an experts module; None if none looks like one."""
    parent = model.get_submodule(layer.module_name.rpartition(".")[0])
    tensors: dict[str, Any] = {**dict(parent.named_parameters()), **dict(parent.named_buffers())}
    outside = {name: tensor for name, tensor in tensors.items() if not name.startswith("experts.")}
    weights = [tensor for tensor in outside.values() if tensor.dim() == 2 and tensor.shape[0] == layer.num_experts]
    biases = [
        tensor for name, tensor in outside.items() if "correction" in name and tensor.numel() == layer.num_experts
    ]
    if len(weights) != 1:
        return None
    return weights[0], biases[0].reshape(-1) if biases else None
