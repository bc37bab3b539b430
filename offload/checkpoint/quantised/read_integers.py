"""Integers in words of 32 bits, and the quantiles of bitsandbytes."""

from dataclasses import replace
from math import prod

from ...codes.encoding import Encoding
from ...codes.turned import WORD_BITS, TurnedEncoding
from ..tensors import TensorEntry
from .description import Quantisation
from .found import Companions, Found, expect_shape, said, scale_name
from .values import expect_quantiles, expect_usual_order, nf4_state, shape_in


def packed_integers(codes: TensorEntry, companions: Companions, described: Quantisation) -> Found:
    """compressed-tensors: words of 32 bits along the columns, half of the range added to each code."""
    shape = shape_in(companions["shape"])
    lead, (rows, columns) = shape[:-2], shape[-2:]
    bits = next((bits for bits in (4, 8) if codes.shape == (*lead, rows, -(-columns * bits // WORD_BITS))), 0)
    if not bits:
        raise ValueError(
            f"{said(codes)}: not {list(shape)} in codes of 4 or 8 bits, which {companions['shape'].name} names"
        )
    scales = companions["scales"]
    across = scales.shape[-1] if scales.shape else 1
    size = columns // across if across > 1 and columns % across == 0 else 0
    if size and described.groups and size not in described.groups:
        raise ValueError(f"{said(scales)}: groups of {size} columns; the config names {described.groups}")
    encoding = Encoding(
        codes=f"offset{bits}",
        group_rows=1,
        group_columns=size,
        scale=scale_name(scales, ("F32", "BF16", "F16")),
        product=scale_name(scales, ("F32", "BF16", "F16")),
        zero="packed" if "zeros" in companions else "none",
        is_word_aligned=True,
    )
    if prod(scales.shape) == prod(lead):
        encoding = replace(encoding, group_rows=0)
    if "order" in companions:
        expect_usual_order(companions["order"], encoding.group_columns or columns)
    return Found(encoding=encoding, shape=shape, rows=rows, columns=columns)


def turned_integers(codes: TensorEntry, companions: Companions, described: Quantisation) -> Found:
    """GPTQ, whose words hold 32 bits of inputs, or AWQ, whose words hold eight outputs."""
    scales, zeros = companions["scales"], companions["zeros"]
    if not len(codes.shape) == len(scales.shape) == len(zeros.shape) == 2 or 0 in (*zeros.shape, *scales.shape):
        raise ValueError(f"{said(codes)}: expected matrices of codes, scales and zeros")
    groups, rows = scales.shape
    bits = zeros.shape[1] * WORD_BITS // rows
    is_awq = codes.shape[1] != rows
    if bits not in ((4,) if is_awq else (4, 8)) or (described.bits and bits not in described.bits):
        raise ValueError(f"{said(zeros)}: {bits} bits for each of {rows} outputs; 4 are known, and 8 of GPTQ")
    columns = codes.shape[0] if is_awq else codes.shape[0] * WORD_BITS // bits
    if is_awq and str(described.settings.get("version", "gemm")).lower() != "gemm":
        raise ValueError(f"{codes.name}: AWQ is known in the version gemm only")
    expect_shape(codes, (columns, rows * bits // WORD_BITS) if is_awq else (columns * bits // WORD_BITS, rows), scales)
    expect_shape(zeros, (groups, rows * bits // WORD_BITS), scales)
    size = columns // groups
    if columns % groups or (described.groups and size not in described.groups and groups > 1):
        raise ValueError(f"{said(scales)}: groups of {columns}/{groups} inputs; the config names {described.groups}")
    if "order" in companions:
        expect_shape(companions["order"], (columns,), codes)
    older = not is_awq and described.settings.get("checkpoint_format", "gptq") == "gptq"
    encoding = TurnedEncoding(
        form="awq" if is_awq else "gptq",
        bits=bits,
        group_columns=size,
        scale=scale_name(scales, ("F16", "BF16")),
        zero_offset=int(older),
        has_order="order" in companions,
    )
    return Found(encoding=encoding, shape=(rows, columns), rows=rows, columns=columns)


def quantiles(codes: TensorEntry, companions: Companions, described: Quantisation) -> Found:
    """bitsandbytes: nf4 over the rows one after the other, the high half of a byte first."""
    if "nested" in companions:
        raise ValueError(
            f"{companions['nested'].name}: scales that are quantised themselves (bnb_4bit_use_double_quant) are not "
            "known here"
        )
    expect_quantiles(companions["map"])
    rows, columns, size, dtype = nf4_state(companions["state"])
    if columns % size or companions["scales"].dtype != "F32":
        raise ValueError(f"{said(codes)}: rows of {columns} in groups of {size}, which are cut, or scales of no F32")
    encoding = Encoding(codes="nf4", group_rows=1, group_columns=size, scale="F32", product=dtype, is_high_first=True)
    return Found(encoding=encoding, shape=(rows, columns), rows=rows, columns=columns)
