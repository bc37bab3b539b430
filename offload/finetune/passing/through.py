"""Gradients through the experts of an offloaded model: the backward pass visits them again and computes them anew.

Only inputs and combine weights get gradients; no expert does. What is kept between the passes is each layer's input.

Shapes: T tokens, K experts per token, D model width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ...checkpoint.experts import experts_modules
from ...compute.routed_rows import ExpertSpans
from .rows import Call, RowGradients, Seen, expert_rows


@contextmanager
def gradients_pass(model: Any) -> Iterator[None]:
    """Within, gradients pass through a model of `offload.load`, to whatever was added to its routers or inputs.

    Its parameters get none. The forward pass computes the bits that it computes otherwise.

    Raises:
        ValueError: if the model is on a GPU, its layers are streamed, or its experts compute themselves.
    """
    runtime, modules = model.offload.runtime, list(experts_modules(model).values())
    if runtime.gpu is not None or runtime.window is not None or runtime.units is not None:
        raise ValueError(
            "gradients pass on the CPU only, and through layers that are in memory; give more --cpu-memory"
        )
    if any(getattr(module, "is_own_loop", False) for module in modules):
        raise ValueError(f"{type(modules[0]).__name__} computes its experts by itself, and passes no gradients")
    before = [module.forward for module in modules]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    for layer, module in enumerate(modules):
        module.forward = partial(_forward, runtime, layer, module)
    model.offload.passes_gradients = True
    try:
        yield
    finally:
        model.offload.passes_gradients = False
        for module, forward in zip(modules, before, strict=True):
            module.forward = forward
        for parameter in wanted:
            parameter.requires_grad_()


def _forward(
    runtime: Any,
    layer: int,
    module: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    out: torch.Tensor = _Experts.apply(hidden_states, top_k_weights, top_k_index, runtime, layer, module)
    return out


class _Experts(torch.autograd.Function):
    """One experts module in one pass."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, weight_TK: torch.Tensor, expert_TK: Any, runtime: Any, layer: int, module: Any
    ) -> Any:
        ctx.save_for_backward(x_TD, weight_TK, expert_TK)
        ctx.place = runtime, layer, module
        return runtime.forward(layer, module, x_TD, expert_TK, weight_TK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        x_TD, weight_TK, expert_TK = ctx.saved_tensors
        runtime, layer, module = ctx.place
        spans = ExpertSpans(expert_TK, runtime.layers[layer].num_experts)
        rows = RowGradients(Call(x_TD, expert_TK, weight_TK, grads[0]), spans)
        for expert, weights in runtime.visit(layer, expert_TK):
            rows.pass_through(expert_rows, module, expert, Seen(weights))
        grad_TD, grad_TK = rows.inputs()
        return grad_TD, grad_TK, None, None, None, None
