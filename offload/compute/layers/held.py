"""Modules and weights whose addresses C has: whether they are still those that were found, and who listens to them."""

from collections.abc import Iterable
from operator import is_
from typing import Any

import torch
from torch import nn

from ...formats.resident.stored_weight import stored_bytes
from ..matvec import is_in_memory


class Held:
    """Modules and weights as they are now.

    Args:
        owners: modules whose children have to stay.
        weights: module and name of each parameter or buffer that C reads.
        silent: modules that will not be called any longer.
    """

    def __init__(
        self, owners: Iterable[nn.Module], weights: Iterable[tuple[nn.Module, str]], silent: Iterable[nn.Module]
    ) -> None:
        silent = list(silent)
        self._hooks = [hooks for module in silent for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        places = [(_holder(module, name), name) for module, name in weights]
        children = [(owner._modules, name) for owner in owners for name in owner._modules]
        forwards = [(vars(module), "forward") for module in silent]
        held: list[tuple[Any, str]] = [*places, *children, *forwards]
        self._look_ups = [(holder.get, name) for holder, name in held]
        self._found = [holder.get(name) for holder, name in held]
        self._weights: list[torch.Tensor] = self._found[: len(places)]
        self._stored = [stored_bytes(weight) for weight in self._weights]
        self._addresses = self._places_of_weights()

    @property
    def is_current(self) -> bool:
        """Whether modules, what computes them, and weights are those that were found, where they were."""
        is_found = all(map(is_, [look_up(name) for look_up, name in self._look_ups], self._found))
        return is_found and self._places_of_weights() == self._addresses

    @property
    def has_listeners(self) -> bool:
        """Whether somebody listens to a module that will not be called."""
        return any(self._hooks)

    @property
    def wants_gradient(self) -> bool:
        """Whether a gradient of a weight is wanted now."""
        return torch.is_grad_enabled() and any(weight.requires_grad for weight in self._weights)

    def _places_of_weights(self) -> list[int]:
        with torch._C.DisableTorchFunctionSubclass():
            return [stored.data_ptr() for stored in self._stored]


def is_recorded() -> bool:
    """Whether `torch.jit.trace` or `make_fx` records what is computed: what C writes would not be in the recording."""
    return torch.jit.is_tracing() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def is_read(states: torch.Tensor) -> bool:
    """Whether our C reads numbers where they lie, and nobody wants their gradient or records what is computed."""
    if is_recorded():
        return False
    is_plain = is_in_memory(states) and states.dtype == torch.bfloat16 and states.is_contiguous()
    return is_plain and not (torch.is_grad_enabled() and states.requires_grad)


def _holder(module: nn.Module, name: str) -> dict[str, Any]:
    return module._parameters if name in module._parameters else module._buffers
