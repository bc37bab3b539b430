"""Decoder layers that are computed again in the backward pass, by torch's own checkpointing, without their experts.

A layer's code runs once more as it is written, up to the last tensor that the backward pass needs. Its experts modules
give what they gave before: nothing is routed twice, no expert is read for it, and no other pass is waited for.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ...checkpoint.experts import experts_modules
from ..storage.activations import SpilledActivations
from ..storage.units import UNIT, Unit


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules of the lists that experts modules are in; the outermost lists, in the order of the model."""
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    found: dict[str, None] = {}
    for name in experts_modules(model):
        parts = name.split(".")
        above = (".".join(parts[:count]) for count in range(1, len(parts)))
        found |= dict.fromkeys([outer for outer in above if outer in lists][:1])
    return [layer for name in found for layer in model.get_submodule(name).children()]


def divide_layers(model: nn.Module, spilled: SpilledActivations) -> None:
    """Let every decoder layer do with its activations what is chosen for it.

    Args:
        model: whose layers' `forward` is replaced.
        spilled: chooses, and takes what is kept.
    """
    for number, layer in enumerate(decoder_layers(model)):
        layer.forward = partial(_forward, layer.forward, number, spilled)


def _forward(forward: Callable[..., Any], layer: int, spilled: SpilledActivations, *args: Any, **kwargs: Any) -> Any:
    number = spilled.current_pass
    if number is None or not torch.is_grad_enabled() or UNIT.get() is not None:
        return forward(*args, **kwargs)
    inputs = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    unit = Unit((layer, number), spilled.choice((layer, number)), inputs.numel())
    started = time.perf_counter()
    if unit.choice == "recomputed":
        out = checkpoint(
            *(forward, *args), use_reentrant=False, preserve_rng_state=False, context_fn=partial(_both, unit), **kwargs
        )
    else:
        with _within(unit):
            out = forward(*args, **kwargs)
    seconds = time.perf_counter() - started - unit.elsewhere_s
    spilled.note_unit(unit.place, seconds, inputs.nbytes)
    return out


def _both(unit: Unit) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What torch opens around the first time and around the second one."""
    return _within(unit), _again(unit)


@contextmanager
def _within(unit: Unit) -> Iterator[None]:
    token = UNIT.set(unit)
    try:
        yield
    finally:
        UNIT.reset(token)


@contextmanager
def _again(unit: Unit) -> Iterator[None]:
    unit.is_rerun = True
    with _within(unit):
        yield
