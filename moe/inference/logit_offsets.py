"""Offsets on router logits from outside, for models of ours and for transformers' mixtures of experts.

Shapes: L MoE layers, R routable experts, T tokens.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from routing import RoutingContext

from ..model.decoder import MoEForCausalLM


@dataclass(frozen=True, eq=False)
class Offsets:
    """Offsets in force.

    Args:
        delta_LR: added to every layer's logits; a leaf that may require gradients.
        logits: the shifted logits [T, R] of each layer in the last forward pass.
        weights: the combine weights [T, K] that each experts module was given in it.
    """

    delta_LR: Tensor
    logits: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def logit_offsets(model: nn.Module) -> Iterator[Offsets]:
    """Inside, every forward pass of `model` adds `delta_LR` (zeros at the start) to its routers' logits.

    Raises:
        ValueError: if the model's routers cannot be found.
    """
    with ExitStack() as stack:
        attach = _own if isinstance(model, MoEForCausalLM) else _native
        offsets = stack.enter_context(attach(model))
        for name, experts in experts_modules(model).items():

            def note(_module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                offsets.weights[name] = inputs[2].detach()

            stack.callback(experts.register_forward_pre_hook(note).remove)
        yield offsets


@contextmanager
def _own(model: MoEForCausalLM) -> Iterator[Offsets]:
    routers = model.model.routers
    num_routable = model.config.router_sizes.num_routable
    offsets = Offsets(torch.zeros(len(routers), num_routable, device=model.device))

    def note(_model: nn.Module, _inputs: Any, output: Any) -> None:
        for layer, call in enumerate(output.router_stats):
            if call.logit_TR is not None:
                offsets.logits[layer] = call.logit_TR

    def add(_router: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_shifted(given, offsets) if isinstance(given, RoutingContext) else given for given in inputs)

    handles = [router.register_forward_pre_hook(add) for router in routers]
    handles.append(model.register_forward_hook(note))
    try:
        yield offsets
    finally:
        for handle in handles:
            handle.remove()


def _shifted(context: RoutingContext, offsets: Offsets) -> RoutingContext:
    given_LR = context.logit_bias_LR
    return replace(context, logit_bias_LR=offsets.delta_LR if given_LR is None else given_LR + offsets.delta_LR)


@contextmanager
def _native(model: nn.Module) -> Iterator[Offsets]:
    routers = native_routers(model)
    num_experts = max(router.weight.shape[0] for router in routers)
    offsets = Offsets(torch.zeros(len(routers), num_experts, device=routers[0].weight.device))
    handles, modes = [], {}

    def enter(router: Any, _inputs: Any) -> None:
        layer = routers.index(router)
        modes[layer] = _AddToLogits(offsets, layer, tuple(router.weight.shape))
        modes[layer].__enter__()

    def leave(router: Any, _inputs: Any, _output: Any) -> None:
        modes.pop(routers.index(router)).__exit__(None, None, None)

    for router in routers:
        handles.append(router.register_forward_pre_hook(enter))
        handles.append(router.register_forward_hook(leave, always_call=True))
    try:
        yield offsets
    finally:
        for handle in handles:
            handle.remove()


def experts_modules(model: nn.Module) -> dict[str, Any]:
    """The modules that compute through transformers' experts interface, by name."""
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
    return {name: module for name, module in model.named_modules() if all(hasattr(module, flag) for flag in flags)}


def native_routers(model: nn.Module) -> list[Any]:
    """The router beside each experts module of a transformers model: a module whose `weight` is [E, D].

    Raises:
        ValueError: if there are no experts, or a router cannot be told.
    """
    routers = []
    for name, experts in experts_modules(model).items():
        parent = model.get_submodule(name.rpartition(".")[0])
        num_experts = getattr(experts, "num_experts", None) or experts.down_proj.shape[0]
        found = [module for module in parent.children() if module is not experts and _scores(module, num_experts)]
        if len(found) != 1:
            raise ValueError(
                f"{name}: expected one router beside the experts, a module with a weight [{num_experts}, width]; "
                f"found {len(found)}"
            )
        routers.extend(found)
    if not routers:
        raise ValueError(f"{type(model).__name__} has no experts behind transformers' experts interface")
    return routers


def _scores(module: nn.Module, num_experts: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[0] == num_experts


class _AddToLogits(TorchFunctionMode):
    """While a router runs: add the layer's offsets to what its weight gives."""

    def __init__(self, offsets: Offsets, layer: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._offsets, self._layer, self._shape = offsets, layer, shape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is linear and tuple(args[1].shape) == self._shape:
            result = result.float() + self._offsets.delta_LR[self._layer, : self._shape[0]]
            self._offsets.logits[self._layer] = result.flatten(0, -2)
        return result
