"""Quantised expert weights: how they are stored, made and turned back; kernels dequantise them as they read.

Shapes: C slots, O outputs, I inputs of a projection.
Source: symmetric int8 per output channel as in Dettmers et al. 2022, arXiv:2208.07339, section 2 (absmax); asymmetric
grouped int4 as in Frantar et al. 2023, arXiv:2210.17323, section 4; fp8 e4m3 with 128 x 128 blocks as in DeepSeek-AI
2024, arXiv:2412.19437, section 3.3.2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FORMATS = ("int8", "int4", "fp8", "fp8_block")
# inputs per scale of int4, and side of the blocks of fp8: as published, see the sources above
BLOCK = 128
# largest number of float8 e4m3fn
E4M3_MAX = 448.0


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """The weights of one projection, quantised.

    Args:
        format: `int8`, `int4` or `fp8`.
        data: [C, O, I] int8 or float8_e4m3fn; for int4 [C, O, I / 2] uint8, even inputs in the low half of a byte.
        scale: [C, O / out_group, I / in_group] float32.
        zero: the same shape for int4 (the code that means 0), else None.
        out_group, in_group: outputs and inputs that share a scale.
        num_inputs: I; for int4 twice the bytes of a row of `data`.
    """

    format: str
    data: Tensor
    scale: Tensor
    zero: Tensor | None
    out_group: int
    in_group: int
    num_inputs: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """[C, O, I]."""
        return self.data.shape[0], self.data.shape[1], self.num_inputs


def quantise(weight_COI: Tensor, name: str, group: int = BLOCK) -> QuantisedWeight:
    """Quantise by rounding to nearest.

    Args:
        weight_COI: a floating-point weight; pass a transposed view for checkpoints that store [C, I, O].
        name: `int8`, `int4`, `fp8` (a scale per output) or `fp8_block` (a scale per 128 x 128 block).
        group: inputs per scale of int4, a power of two that divides I.

    Raises:
        ValueError: if the format is unknown or the sizes do not fit it.
    """
    if name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known are {', '.join(FORMATS)}")
    num_inputs = weight_COI.shape[2]
    value = weight_COI.float()
    if name == "int8":
        scale = _positive(value.abs().amax(2, keepdim=True) / 127)
        data = (value / scale).round().to(torch.int8)
        return QuantisedWeight("int8", data.contiguous(), scale, None, 1, num_inputs, num_inputs)
    if name == "int4":
        return _quantise_int4(value, group)
    if name == "fp8":
        scale = _positive(value.abs().amax(2, keepdim=True) / E4M3_MAX)
        data = (value / scale).to(torch.float8_e4m3fn)
        return QuantisedWeight("fp8", data.contiguous(), scale, None, 1, num_inputs, num_inputs)
    return _quantise_fp8_block(value)


def dequantise(weight: QuantisedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """[C, O, I]: what the kernels compute with, up to the rounding of `dtype`."""
    if weight.format == "int4":
        code = torch.stack([weight.data & 0xF, weight.data >> 4], dim=-1).flatten(-2).float()
    else:
        code = weight.data.float()
    _, num_outputs, num_inputs = weight.shape

    def spread(values: Tensor) -> Tensor:
        wide = values.repeat_interleave(weight.out_group, 1).repeat_interleave(weight.in_group, 2)
        return wide[:, :num_outputs, :num_inputs]

    if weight.zero is not None:
        code = code - spread(weight.zero)
    return (code * spread(weight.scale)).to(dtype)


def _quantise_int4(value: Tensor, group: int) -> QuantisedWeight:
    slots, outputs, num_inputs = value.shape
    if group < 16 or group & (group - 1) or num_inputs % group:
        raise ValueError(f"int4 needs a group that is a power of two >= 16 and divides {num_inputs}; got {group}")
    grouped = value.view(slots, outputs, num_inputs // group, group)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = _positive((high - low) / 15)
    zero = (-low / scale).round()
    code = ((grouped / scale[..., None]).round() + zero[..., None]).clamp(0, 15).to(torch.uint8).view(value.shape)
    data = code[..., ::2] | (code[..., 1::2] << 4)
    return QuantisedWeight("int4", data.contiguous(), scale, zero, 1, group, num_inputs)


def _quantise_fp8_block(value: Tensor) -> QuantisedWeight:
    slots, outputs, num_inputs = value.shape
    rows, columns = -(-outputs // BLOCK), -(-num_inputs // BLOCK)
    padded = value.new_zeros(slots, rows * BLOCK, columns * BLOCK)
    padded[:, :outputs, :num_inputs] = value
    scale = _positive(padded.view(slots, rows, BLOCK, columns, BLOCK).abs().amax((2, 4)) / E4M3_MAX)
    wide = scale.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :outputs, :num_inputs]
    data = (value / wide).to(torch.float8_e4m3fn)
    return QuantisedWeight("fp8", data.contiguous(), scale, None, BLOCK, BLOCK, num_inputs)


def _positive(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, 1.0)
