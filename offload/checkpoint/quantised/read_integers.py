"""Integers in words of 32 bits, those of HQQ, and the quantiles of bitsandbytes."""

from dataclasses import replace
from math import prod

from ...codes.encoding import Encoding
from ...codes.hqq import PACKINGS, HqqEncoding
from ...codes.nested import NestedEncoding
from ...codes.stored_matrix import AnyEncoding
from ...codes.turned import WORD_BITS, TurnedEncoding
from ..tensors import STORED_DTYPES, TensorEntry
from .description import Quantisation
from .found import Companions, Found, expect_shape, said, scale_name
from .values import expect_quantiles, integer_in, is_usual_order, nf4_state, shape_in, text_in

PACKED_BITS = (4, 8, 3, 2)
"""Of a code. Fewer than 32 columns may fill as many words with codes of 3 bits as of 4: the config decides then."""


def packed_integers(codes: TensorEntry, companions: Companions, described: Quantisation) -> Found:
    """compressed-tensors: words of 32 bits along the columns, half of the range added to each code."""
    shape = shape_in(companions["shape"]) or _shape_of_words(codes, described)
    lead, (rows, columns) = shape[:-2], shape[-2:]
    fitting = [bits for bits in PACKED_BITS if codes.shape == (*lead, rows, -(-columns * bits // WORD_BITS))]
    bits = next((bits for bits in fitting if bits in (described.bits or PACKED_BITS)), 0)
    if not bits:
        raise ValueError(
            f"{said(codes)}: not {list(shape)} in codes of 2, 3, 4 or 8 bits, which {companions['shape'].name} names"
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
    if "order" in companions and not is_usual_order(companions["order"], encoding.group_columns or columns):
        encoding = replace(encoding, has_order=True)
    return Found(encoding=encoding, shape=shape, rows=rows, columns=columns)


def _shape_of_words(codes: TensorEntry, described: Quantisation) -> tuple[int, ...]:
    """The plain shape where the companion that holds it is not here: as many columns as there are codes."""
    bits = described.bits[0] if described.bits else PACKED_BITS[0]
    return (*codes.shape[:-1], codes.shape[-1] * WORD_BITS // bits)


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
        is_sorted="order" in companions and groups > 1 and bool(described.settings.get("desc_act", False)),
    )
    return Found(encoding=encoding, shape=(rows, columns), rows=rows, columns=columns)


def reshaped_integers(codes: TensorEntry, companions: Companions, described: Quantisation) -> Found:
    """HQQ: a weight reshaped to groups, each with a scale and a zero that is any number."""
    packing, group, axis = (
        text_in(companions["packing"]),
        integer_in(companions["group"]),
        integer_in(companions["axis"]),
    )
    shape = shape_in(companions["shape"]) or ()
    if packing not in PACKINGS:
        raise ValueError(f"{companions['packing'].name}: names the packing {packing!r}; known: {', '.join(PACKINGS)}")
    if len(shape) != 2 or group < 1 or prod(shape) % group or axis not in (0, 1):
        raise ValueError(f"{codes.name}: groups of {group} along axis {axis} are no division of {list(shape)}")
    encoding = HqqEncoding(
        packing=packing, group=group, axis=axis, scale=scale_name(companions["scales"], ("F16", "BF16", "F32"))
    )
    lines, per_item = encoding.lines(*shape)[0], PACKINGS[packing].count
    if lines % per_item and packing != "3bit_32":
        raise ValueError(f"{codes.name}: {lines} lines do not fill items of {per_item} codes ({packing})")
    for role in ("scales", "zeros"):
        expect_shape(companions[role], (prod(shape) // group, 1) if axis else (1, prod(shape) // group), codes)
    scales, zeros = companions["scales"], companions["zeros"]
    named = text_in(companions["dtype"]) if "dtype" in companions else ""
    if not scales.dtype == zeros.dtype == STORED_DTYPES.get(named.removeprefix("torch."), scales.dtype):
        raise ValueError(f"{said(zeros)}: expected the dtype of {said(scales)}, and of products ({named})")
    return Found(encoding=encoding, shape=shape, rows=shape[0], columns=shape[1])


def quantiles(codes: TensorEntry, companions: Companions, described: Quantisation) -> Found:
    """bitsandbytes: nf4 over the rows one after the other, the high half of a byte first."""
    state = nf4_state(companions["state"])
    expect_quantiles(companions["map"])
    rows, columns = state.shape
    is_nested = state.block_groups > 0
    if columns % state.group_columns or companions["scales"].dtype != ("U8" if is_nested else "F32"):
        raise ValueError(
            f"{said(companions['scales'])}: not a scale for each {state.group_columns} columns of {codes.name} "
            f"[{rows}, {columns}], none of which crosses a row"
        )
    encoding: AnyEncoding = NestedEncoding(
        group_columns=state.group_columns,
        block_groups=state.block_groups,
        offset=state.offset,
        product=state.product,
    )
    if not is_nested:
        encoding = encoding.packed
    for role in ("nested", "table") if is_nested else ():
        if role not in companions or companions[role].dtype != "F32":
            raise ValueError(f"{codes.name}: has no {role} scales of F32 beside it, which its state names")
    return Found(encoding=encoding, shape=(rows, columns), rows=rows, columns=columns)
