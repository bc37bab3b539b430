"""Dense feed-forwards whose inactive units are exactly zero: which linear layers they are made of.

Shapes: F hidden units, D model width.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..checkpoint.tensors import TensorEntry
from ..window.guests import Matches, plain_entry
from .unit_layer import UnitLayer, expect_zero_below_zero, rounded, stamp, stored_bytes

SPELLINGS = (("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj"), ("fc1", "fc2"))
"""Names of the layers of a feed-forward; the first is what the activation is applied to."""
ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation")
STAMP_BYTES = 1 << 16
"""Of each tensor's beginning: another checkpoint of the same shapes differs there."""


@dataclass(frozen=True, eq=False, kw_only=True)
class FeedForward(UnitLayer):
    """One dense feed-forward; its parts are linear layers of its module.

    Args:
        entries: where the checkpoint has the weight of each.
    """

    entries: tuple[TensorEntry, ...]

    @property
    def weight_names(self) -> frozenset[str]:
        return frozenset(f"{self.name}.{part}.weight" for part in self.parts)

    def stamps(self) -> tuple[str, ...]:
        return tuple(stamp(_bytes(entry, STAMP_BYTES)) for entry in self.entries)

    def matrices(self) -> Iterator[tuple[torch.Tensor, ...]]:
        yield tuple(_tensor(entry) for entry in self.entries)


def find_feed_forwards(model: nn.Module, entries: Mapping[str, TensorEntry], found: Matches) -> tuple[FeedForward, ...]:
    """All dense feed-forwards of a model, in its order.

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
    expect_zero_below_zero(name, activation, "unknown" if activation is None else type(activation).__name__)
    stored = []
    for part in parts:
        weight: Any = getattr(module, part).weight
        entry = plain_entry([f"{name}.{part}.weight"], tuple(weight.shape), entries, found)
        if entry is None or entry.torch_dtype() != weight.dtype:
            raise ValueError(f"{name}.{part}: its weight is not one plain tensor of {weight.dtype} in the checkpoint")
        stored.append(entry)
    F, D = stored[0].shape
    return FeedForward(
        name=name, parts=parts, num_units=F, rows_at_once=rounded(F), width=D, dtype=weight.dtype, entries=tuple(stored)
    )


def _activation(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    return next((getattr(module, name) for name in ACTIVATIONS if callable(getattr(module, name, None))), None)


def _tensor(entry: TensorEntry) -> torch.Tensor:
    return torch.frombuffer(_bytes(entry, entry.nbytes), dtype=entry.torch_dtype()).view(entry.shape)


def _bytes(entry: TensorEntry, most: int) -> bytearray:
    return stored_bytes(entry.file, entry.offset, min(most, entry.nbytes), entry.name)
