"""What an offloaded model refuses, because it would not be what the resident model does."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..compute.layers.held import is_recorded


def expect_no_gradient(*tensors: torch.Tensor) -> None:
    """Refuse a call that would have to pass gradients through experts.

    Raises:
        RuntimeError: if one of the tensors wants a gradient.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            "gradients do not pass through offloaded experts; run the model under torch.no_grad(), "
            "or train a model that fits in memory"
        )


def expect_numbers_in_memory(*tensors: torch.Tensor) -> None:
    """Refuse tensors that stand for others: experts are read and multiplied by their addresses in memory.

    Raises:
        RuntimeError: for fake tensors of exporters, tensors that vmap or another transform has wrapped, and calls that
            `torch.jit.trace` or `make_fx` records: what C writes would not be in the recording.
    """
    if is_recorded():
        raise RuntimeError(
            "products of offloaded experts cannot be recorded by torch.jit.trace or make_fx; trace the resident model"
        )
    for tensor in tensors:
        if isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            raise RuntimeError(
                "offloaded experts are computed on numbers in memory; export and vmap the resident model instead"
            )


def guard_model(model: Any) -> None:
    """Replace the methods of a model that would silently leave out what is on disk.

    `save_pretrained` and `state_dict` refuse, `num_parameters` counts the experts, and conversions refuse: what is on
    disk would keep its dtype and device.
    """
    num_expert_parameters = sum(map(prod, model.expert_shapes.values()))
    absent = "expert" if model.expert_shapes else "streamed"
    count, apply, choose = model.num_parameters, model._apply, model.set_experts_implementation

    def refuse_to_save(*args: Any, **kwargs: Any) -> None:
        raise ValueError(f"an offloaded model has no {absent} weights to save; copy its checkpoint folder instead")

    def state_dict(*args: Any, **kwargs: Any) -> Any:
        """As a part of an adapted model, for PEFT to pick the adapters from; by itself it would lack the experts."""
        if kwargs.get("destination") is None or not _adapters_of(model):
            refuse_to_save()
        return type(model).state_dict(model, *args, **kwargs)

    def num_parameters(*args: Any, **kwargs: Any) -> int:
        is_trainable = kwargs.get("only_trainable", bool(args and args[0]))
        return int(count(*args, **kwargs)) + (0 if is_trainable else num_expert_parameters)

    def apply_to_tensors(change: Callable[[torch.Tensor], torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        for parameter in list(model.parameters())[:1]:
            changed = change(torch.empty(0, dtype=parameter.dtype, device=parameter.device))
            if (changed.dtype, changed.device) != (parameter.dtype, parameter.device):
                raise RuntimeError(
                    f"an offloaded model keeps the dtype and device it was loaded with ({parameter.dtype}, "
                    f"{parameter.device}); load it again with dtype= or device="
                )
        return apply(change, *args, **kwargs)

    def set_experts_implementation(name: Any) -> Any:
        if name != model.config._experts_implementation:
            raise RuntimeError(f"experts on disk are computed by the offload runtime only, not by {name!r}")
        return choose(name)

    model.save_pretrained, model.state_dict = refuse_to_save, state_dict
    model.num_parameters, model._apply = num_parameters, apply_to_tensors
    model.set_experts_implementation = set_experts_implementation
    model.base_model.register_forward_pre_hook(ExpertAdapters(model))


def _adapters_of(model: Any) -> dict[str, Any]:
    """Configs of PEFT's adapters by name; PEFT leaves them on the model that it changed."""
    return getattr(model, "peft_config", None) or {}


class ExpertAdapters:
    """Refuses a pass through a model with adapters of experts: PEFT finds no weight there, and leaves them out.

    Args:
        model: from `load`; copied along when the model is.
    """

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, module: Any, args: Any) -> None:
        """Called before each forward pass.

        Raises:
            RuntimeError: if an adapter is meant for weights of experts.
        """
        for name, config in _adapters_of(self._model).items():
            targets = tuple(getattr(config, "target_parameters", None) or ())
            ends = tuple(f".{target}" for target in targets)
            left_out = [key for key in self._model.expert_shapes if key in targets or key.endswith(ends)]
            if left_out and not getattr(self._model, "has_expert_adapters", False):
                raise RuntimeError(
                    f"adapter {name!r} changes weights of experts ({left_out[0]}), which stay on disk; adapt other "
                    "layers only, or load it with offload.load(adapter=...)"
                )
