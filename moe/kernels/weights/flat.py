"""ExpertWeights as operators of PyTorch take it: one tensor or plain value per argument, and back.

The fields of `FlatWeights` are the only list of these arguments: schemas, calls and gradients are made from it.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from .activation import Activation
from .quantise import QuantisedWeight
from .weights import ExpertWeights

DENSE = "dense"
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    bool: "bool",
    float: "float",
    float | None: "float?",
    list[int]: "int[]",
}


class FlatWeights(NamedTuple):
    """The fields of `ExpertWeights`, `QuantisedWeight` and `Activation` side by side.

    Args:
        up, down: dense weights [C, O, D] and [C, D, F], or the codes of quantised ones.
        up_bias, down_bias: [C, O] and [C, D].
        slot: int32 [E], the slot of each expert; None where slots are experts.
        up_scale, up_zero, down_scale, down_zero: scales and zeros of quantised weights, else None.
        format: `dense`, or the format of both projections.
        groups: of quantised weights, outputs and inputs per scale of `up`, then of `down`; else empty.
        inner, gated, alpha, limit, shift: fields of `Activation`.
        is_halves: whether all gates lie before all ups among the outputs of `up`.
    """

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    slot: Tensor | None
    up_scale: Tensor | None
    up_zero: Tensor | None
    down_scale: Tensor | None
    down_zero: Tensor | None
    format: str
    groups: list[int]
    inner: str
    gated: bool
    alpha: float
    limit: float | None
    shift: float
    is_halves: bool

    @classmethod
    def schema(cls) -> str:
        """The fields as arguments of an operator's schema."""
        return ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in cls.__annotations__.items())

    @classmethod
    def nothing(cls) -> Self:
        """None in every field: the gradients where there are none."""
        return cls(*(None for _ in cls._fields))

    def without_tensors(self) -> Self:
        """The plain values alone, which an autograd context may hold; see `with_tensors`."""
        return self._replace(**dict.fromkeys(TENSORS))

    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors alone, in the order of the fields, for `save_for_backward`."""
        return tuple(getattr(self, name) for name in TENSORS)

    def with_tensors(self, tensors: tuple[Tensor | None, ...]) -> Self:
        """The same plain values with the tensors of `tensors()`."""
        return self._replace(**dict(zip(TENSORS, tensors, strict=True)))


TENSORS = tuple(name for name, kind in FlatWeights.__annotations__.items() if kind in (Tensor, Tensor | None))


def flatten(weights: ExpertWeights, dtype: torch.dtype | None = None) -> FlatWeights:
    """The fields of weights.

    Args:
        weights: dense or quantised experts.
        dtype: dense projections and biases are cast to it, codes, scales and zeros are not; None casts nothing.

    Returns:
        The fields; `unflatten` is the inverse.
    """
    up, down, activation = weights.up, weights.down, weights.activation
    up_bias, down_bias = _cast(weights.up_bias, dtype), _cast(weights.down_bias, dtype)
    if isinstance(up, QuantisedWeight):
        stored = (up.data, down.data, up_bias, down_bias, weights.slot_E, up.scale, up.zero, down.scale, down.zero)
        layout = (up.format, [up.out_group, up.in_group, down.out_group, down.in_group])
    else:
        scales = (None, None, None, None)
        stored = (_cast(up, dtype), _cast(down, dtype), up_bias, down_bias, weights.slot_E, *scales)
        layout = (DENSE, [])
    settings = (activation.inner, activation.gated, activation.alpha, activation.limit, activation.shift)
    return FlatWeights(*stored, *layout, *settings, weights.is_halves)


def _cast(tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    return tensor if tensor is None or dtype is None else tensor.to(dtype)


def unflatten(flat: FlatWeights) -> ExpertWeights:
    """The weights whose fields these are; biases become contiguous, as kernels read them."""
    up, down = flat.up, flat.down
    if flat.format != DENSE:
        up_out, up_in, down_out, down_in = flat.groups
        up = _quantised(flat.format, up, flat.up_scale, flat.up_zero, (up_out, up_in))
        down = _quantised(flat.format, down, flat.down_scale, flat.down_zero, (down_out, down_in))
    up_bias, down_bias = (None if bias is None else bias.contiguous() for bias in (flat.up_bias, flat.down_bias))
    activation = Activation(flat.inner, flat.gated, flat.alpha, flat.limit, flat.shift)
    return ExpertWeights(up, down, up_bias, down_bias, activation, flat.is_halves, flat.slot)


def _quantised(name: str, data: Tensor, scale: Tensor, zero: Tensor | None, group: tuple[int, int]) -> QuantisedWeight:
    codes_per_byte = 2 if name == "int4" else 1
    return QuantisedWeight(name, data, scale, zero, *group, data.shape[2] * codes_per_byte)
