"""Feed-forwards whose inactive units are exactly zero: which linear layers they are made of.

A unit is a row of the matrices before the activation and a column of the one after it. It is active where its gate's
product is positive. What a unit gives where it is not active must be zero, so that nothing has to be read of it.

Shapes: F hidden units, D model width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoint.tensors import TensorEntry
from ..window.guests import Matches, plain_entry

SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj"), ("fc1", "fc2"))
"""Names of the layers of a feed-forward; the first is what the activation is applied to."""
ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
TRIED = (-1e-6, -0.5, -3.0, -1e4)
"""Inputs at which an activation has to be zero."""


@dataclass(frozen=True, eq=False)
class FeedForward:
    """One feed-forward of a model.

    Args:
        name: of the module that holds its layers.
        parts: names of the layers in it: the gate first, the one after the activation last.
        entries: where the checkpoint has the weight of each.
        dtype: of the running model.
    """

    name: str
    parts: tuple[str, ...]
    entries: tuple[TensorEntry, ...]
    dtype: torch.dtype

    @property
    def num_units(self) -> int:
        """F."""
        return self.entries[0].shape[0]

    @property
    def width(self) -> int:
        """D."""
        return self.entries[0].shape[1]

    @property
    def unit_bytes(self) -> int:
        """Of one unit: a row of each matrix before the activation, a column of the one after it."""
        return len(self.parts) * self.width * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Of all units."""
        return self.num_units * self.unit_bytes

    @property
    def weight_names(self) -> frozenset[str]:
        """Full names of its matrices."""
        return frozenset(f"{self.name}.{part}.weight" for part in self.parts)


def find_feed_forwards(model: nn.Module, entries: Mapping[str, TensorEntry], found: Matches) -> tuple[FeedForward, ...]:
    """All feed-forwards of a model, in its order.

    Args:
        model: on the meta device, in the dtype it will run in.
        entries: the checkpoint's tensors.
        found: what `match_checkpoint` says of the two.

    Raises:
        ValueError: if there is none, one is not zero where it is not active, or its weights are not stored plainly.
    """
    feed_forwards = tuple(_found(name, module, entries, found) for name, module, _ in _spelt(model))
    if not feed_forwards:
        spelt = "; ".join(", ".join(names) for names in SPELLINGS)
        raise ValueError(f"{type(model).__name__} has no feed-forward that is known here ({spelt})")
    return feed_forwards


def _spelt(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    for name, module in model.named_modules():
        for parts in SPELLINGS:
            if all(isinstance(getattr(module, part, None), nn.Linear) for part in parts):
                yield name, module, parts
                break


def _found(name: str, module: nn.Module, entries: Mapping[str, TensorEntry], found: Matches) -> FeedForward:
    parts = next(parts for _, _, parts in _spelt(module))
    activation = _activation(module)
    if activation is None or not is_zero_below_zero(activation):
        kind = type(activation).__name__ if activation is not None else "unknown"
        raise ValueError(
            f"{name}: its activation ({kind}) is not zero where the gate is negative, so every unit of every token is "
            "needed; `expertier trace neurons` says how sparse a model is"
        )
    stored = []
    for part in parts:
        weight: Any = getattr(module, part).weight
        entry = plain_entry([f"{name}.{part}.weight"], tuple(weight.shape), entries, found)
        if entry is None or entry.torch_dtype() != weight.dtype:
            raise ValueError(f"{name}.{part}: its weight is not one plain tensor of {weight.dtype} in the checkpoint")
        stored.append(entry)
    return FeedForward(name, parts, tuple(stored), weight.dtype)


def _activation(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    return next((getattr(module, name) for name in ACTIVATIONS if callable(getattr(module, name, None))), None)


def is_zero_below_zero(activation: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether an activation gives zero for everything that is not positive: ReLU and its square."""
    with torch.no_grad():
        return not activation(torch.tensor([0.0, *TRIED])).any()


def total_bytes(feed_forwards: Sequence[FeedForward]) -> int:
    """Of all units of all feed-forwards."""
    return sum(each.nbytes for each in feed_forwards)
