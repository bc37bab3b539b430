"""Which linear layers of a model stay as their checkpoint stores them, and how they are held."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe import Linear

from ...memory.huge_pages import huge_mapping
from ..form import MatrixForm
from .stored_weight import StoredWeight

PLAIN_LINEARS = (nn.Linear, Linear)
"""What these compute is known from the type alone."""
ALIGNMENT_BYTES = 64
"""A cache line, and a register of AVX-512: no load of a weight touches two lines."""
IsMultiplied = Callable[[tuple[int, int]], bool]
"""Whether our C multiplies single tokens with a matrix of this shape, as promised of the model's bits."""


@dataclass(frozen=True, eq=False)
class StoredLinear:
    """A weight of a linear layer that a checkpoint stores in a form.

    Args:
        nbytes: that it takes in memory, as it is stored.
        read: gives these bytes, uint8, in memory of their own.
    """

    form: MatrixForm
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], torch.Tensor]


def find_stored(
    model: nn.Module, place: Callable[[str], StoredLinear | None], is_multiplied: IsMultiplied
) -> dict[str, StoredLinear]:
    """The linear layers that need not be expanded, by the full name of their weight.

    Args:
        model: on the meta device, in the dtype it will run in.
        place: says how a checkpoint stores a parameter; None if that is no form to multiply from.
        is_multiplied: whether a shape is multiplied from stored bytes at all.
    """
    # without duplicates removed, a weight that two modules share has two names
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found = {}
    for name, module in model.named_modules():
        if type(module) not in PLAIN_LINEARS or module.weight.dtype != torch.bfloat16 or uses[id(module.weight)] > 1:
            continue
        shape = (module.out_features, module.in_features)
        stored = place(f"{name}.weight") if is_multiplied(shape) else None
        if stored is not None and stored.shape == shape:
            found[f"{name}.weight"] = stored
    return found


def count_stored(model: nn.Module) -> dict[str, int]:
    """How many weights are held in each stored form."""
    return dict(Counter(weight.form.name for weight in model.parameters() if isinstance(weight, StoredWeight)))


def hold_stored(model: nn.Module, linears: Mapping[str, StoredLinear]) -> None:
    """Hold linear layers as they are stored, all in one mapping.

    Args:
        model: whose weights of these layers hold no memory; on the meta device nothing is read.
        linears: of `find_stored`.
    """
    total = sum(aligned(linear.nbytes) for linear in linears.values())
    if not total:
        return
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    place = torch.empty(total, dtype=torch.uint8, device="meta") if is_meta else room_of(total)
    start = 0
    for name, linear in linears.items():
        stored = place[start : start + linear.nbytes]
        if not is_meta:
            stored.copy_(linear.read())
        hold(model.get_submodule(name.removesuffix(".weight")), stored, linear.form)
        start += aligned(linear.nbytes)


def aligned(nbytes: int) -> int:
    """A whole multiple of the alignment."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def room_of(nbytes: int) -> torch.Tensor:
    """Memory in huge pages, uint8."""
    return torch.frombuffer(huge_mapping(nbytes), dtype=torch.uint8)


def hold(module: Any, stored: torch.Tensor, form: MatrixForm) -> None:
    """Give a linear layer its weight as stored bytes."""
    shape = (module.out_features, module.in_features)
    module.weight = nn.Parameter(StoredWeight(stored, shape, form), requires_grad=False)
    # a compiler would trace the expansion, whose C works on addresses
    module.forward = torch.compiler.disable(module.forward)  # type: ignore[no-untyped-call]
