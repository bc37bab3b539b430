"""How kernels read the weights of one slot: a tile `[outputs, inputs]`, dense or dequantised on the way.

Weights are always seen as `[C, O, I]` (slot, output, input); a transposed checkpoint is the same tensor with other
strides. The outputs of a gated up projection are visited in pair order (gate 0, up 0, gate 1, up 1, ...), whatever
their order in memory, so that one accumulator holds both halves of a gate and the halves of a pair sit in one thread.

Formats: `dense`; `int8` (one scale per output); `int4` (two inputs per byte, a scale and a zero per group of inputs);
`fp8` (e4m3 as bytes, a scale per output or per block of outputs and inputs).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantise import QuantisedWeight

# e4m3 bits moved into float32's place have an exponent that is short by the difference of the biases, 127 - 7
FP8_EXPONENT_GAP = tl.constexpr(2.0**120)
# stands for "all inputs share a scale", so that one compiled kernel serves every number of inputs
ALL_INPUTS = 1 << 30


class Projection(NamedTuple):
    """The weights of one projection inside a kernel: what `weight_arguments` describes, but for the tile's sizes."""

    weight_ptr: tl.tensor
    scale_ptr: tl.tensor
    zero_ptr: tl.tensor
    stride_slot: tl.tensor
    stride_out: tl.tensor
    stride_in: tl.tensor
    scale_stride_slot: tl.tensor
    scale_stride_out: tl.tensor
    scale_stride_in: tl.tensor
    FORMAT: tl.constexpr
    OUT_GROUP: tl.constexpr
    IN_GROUP: tl.constexpr


@triton.jit
def memory_row(pair_order, half, HALVES: tl.constexpr):
    """Where an output of the up projection lies in memory: gates before ups (`HALVES`), or in pair order already."""
    if HALVES:
        return (pair_order % 2) * half + pair_order // 2
    else:
        return pair_order


@triton.jit
def int4_bias(COMPUTE: tl.constexpr):
    """What `load_codes` adds to int4 codes: a mantissa filled by OR needs no conversion, but counts from here."""
    return 128.0 if COMPUTE == tl.bfloat16 else (1024.0 if COMPUTE == tl.float16 else 0.0)


@triton.jit
def load_codes(
    slot,
    out,
    is_out,
    in_start,
    num_inputs,
    projection,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """A tile as stored, exact in COMPUTE; int4 codes come with `int4_bias` added."""
    PACK: tl.constexpr = 2 if projection.FORMAT == "int4" else 1
    tile_ptr = projection.weight_ptr + slot.to(tl.int64) * projection.stride_slot
    out_offset = out * projection.stride_out
    local = tl.arange(0, BLOCK_IN // PACK)
    start = in_start // PACK
    mask = is_out[:, None]
    if not EVEN:
        mask = mask & ((start + local)[None, :] < num_inputs // PACK)
    in_ptr = tile_ptr + start.to(tl.int64) * projection.stride_in
    stored = tl.load(in_ptr + out_offset[:, None] + local[None, :] * projection.stride_in, mask=mask, other=0)
    if projection.FORMAT == "int4":
        code = tl.reshape(tl.join(stored & 0xF, stored >> 4), (BLOCK_OUT, BLOCK_IN))
        if COMPUTE == tl.bfloat16:
            return (code.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)
        elif COMPUTE == tl.float16:
            return (code.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
        else:
            return code.to(COMPUTE)
    elif projection.FORMAT == "fp8":
        bits = stored.to(tl.int32)
        moved = ((bits & 0x80) << 24) | ((bits & 0x7F) << 20)
        return (moved.to(tl.float32, bitcast=True) * FP8_EXPONENT_GAP).to(COMPUTE)
    else:
        return stored.to(COMPUTE)


@triton.jit
def load_scale(scale_ptr, slot, out, is_out, in_start, projection):
    """One scale (or zero) per output of a tile; a tile never spans two groups of inputs."""
    slot_ptr = scale_ptr + slot.to(tl.int64) * projection.scale_stride_slot
    group_ptr = slot_ptr + (in_start // projection.IN_GROUP) * projection.scale_stride_in
    scale = tl.load(group_ptr + (out // projection.OUT_GROUP) * projection.scale_stride_out, mask=is_out, other=0)
    return scale.to(tl.float32)


@triton.jit
def load_weight(
    slot,
    out,
    is_out,
    in_start,
    num_inputs,
    projection,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    EVEN: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """The weights `[out, in_start : in_start + BLOCK_IN]` of a slot, in COMPUTE."""
    code = load_codes(slot, out, is_out, in_start, num_inputs, projection, BLOCK_OUT, BLOCK_IN, EVEN, COMPUTE)
    if projection.FORMAT == "dense":
        return code
    else:
        scale = load_scale(projection.scale_ptr, slot, out, is_out, in_start, projection)
        if projection.FORMAT == "int4":
            zero = load_scale(projection.zero_ptr, slot, out, is_out, in_start, projection)
            value = (code.to(tl.float32) - (zero + int4_bias(COMPUTE))[:, None]) * scale[:, None]
        else:
            value = code.to(tl.float32) * scale[:, None]
        return value.to(COMPUTE)


def weight_arguments(weight: Tensor | QuantisedWeight, block_in: int) -> dict:
    """The kernel arguments that describe a weight seen as `[C, O, I]`.

    Args:
        weight: a dense view, or a quantised weight.
        block_in: inputs per tile that the kernel would like; a group of a quantised weight may be narrower.

    Returns:
        Arguments by parameter name; `BLOCK_IN` is the inputs per tile to use.
    """
    if isinstance(weight, QuantisedWeight):
        data, scale, zero = weight.data, weight.scale, weight.zero
        num_inputs, out_group = weight.num_inputs, weight.out_group
        in_group = weight.in_group if num_inputs > weight.in_group else ALL_INPUTS
        data = data.view(torch.uint8) if weight.format == "fp8" else data
        block_in = min(block_in, in_group)
        scale_strides = scale.stride()
        name = weight.format
    else:
        data, scale, zero = weight, None, None
        out_group = in_group = 1
        num_inputs, scale_strides, name = weight.shape[2], (0, 0, 0), "dense"
    return {
        "weight_ptr": data,
        "scale_ptr": scale,
        "zero_ptr": zero,
        "weight_stride_slot": data.stride(0),
        "weight_stride_out": data.stride(1),
        "weight_stride_in": data.stride(2),
        "scale_stride_slot": scale_strides[0],
        "scale_stride_out": scale_strides[1],
        "scale_stride_in": scale_strides[2],
        "FORMAT": name,
        "OUT_GROUP": out_group,
        "IN_GROUP": in_group,
        "BLOCK_IN": block_in,
        "EVEN_IN": num_inputs % block_in == 0,
    }
