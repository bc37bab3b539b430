"""The definition of every encoding, in torch: what the C has to agree with, and what stands in where there is no C."""

from collections.abc import Mapping
from functools import cache

import torch

from .bits import unpack_bits
from .encoding import CODE_BITS, EXPONENT_SCALES, WORD_BYTES, Encoding

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Values of the sixteen codes, by the OCP standard of microscaling formats."""
NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of the normal distribution (QLoRA, arXiv:2305.14314, appendix E)."""
PRODUCT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F127": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
PART_OF_127 = 7.874015718698502e-3
"""What products of LLM.int8 are multiplied by, in float32: bitsandbytes' own number for a 127th."""
SCALE_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "E4M3": torch.float8_e4m3fn,
}


def decode(
    encoding: Encoding, parts: Mapping[str, torch.Tensor], rows: int, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """A matrix of which only the stored parts are known.

    Args:
        encoding: what they mean.
        parts: uint8, by role.
        rows: of the matrix, its outputs.
        columns: of the matrix, its inputs.
        dtype: what the weights are rounded to.

    Returns:
        `[rows, columns]`, in memory of its own.
    """
    code_RC = _code_numbers(encoding, parts["codes"], rows, columns)
    value_RC = code_values(encoding.codes)[code_RC]
    group_C = _group_of_column(encoding, parts, rows, columns)
    if encoding.zero != "none":
        value_RC = value_RC - _spread(_zeros(encoding, parts["zeros"], rows, columns), encoding, rows, group_C)
    product = PRODUCT_DTYPES[encoding.product]
    scale_RC = _spread(_scales(encoding, parts, rows, columns), encoding, rows, group_C)
    weight_RC = value_RC.to(product) * scale_RC.to(product)
    return (weight_RC * PART_OF_127 if encoding.product == "F127" else weight_RC).to(dtype)


@cache
def code_values(codes: str) -> torch.Tensor:
    """What each code of a kind is worth, float32."""
    if codes == "e2m1":
        return torch.tensor(E2M1)
    if codes == "nf4":
        return torch.tensor(NF4)
    if codes == "e4m3":
        return torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    if codes == "int8":
        return torch.arange(256).to(torch.uint8).view(torch.int8).float()
    count = 1 << CODE_BITS[codes]
    first = -count // 2 if codes.startswith("offset") else 0
    return torch.arange(first, first + count).float()


def _code_numbers(encoding: Encoding, codes: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    byte_RB = codes.view(rows, encoding.row_bytes(columns))
    if encoding.bits == 8:
        return byte_RB[:, :columns].int()
    if encoding.bits < 4:
        return unpack_bits(byte_RB, encoding.bits, columns)
    halves = (byte_RB >> 4, byte_RB & 15) if encoding.is_high_first else (byte_RB & 15, byte_RB >> 4)
    return torch.stack(halves, dim=-1).view(rows, -1)[:, :columns].int()


def _scales(encoding: Encoding, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    """Scales as float32 or float64, `[down, across]`."""
    down, across = encoding.grid(rows, columns)
    # a clone, because a part may begin at any byte of a slot, and torch views larger items at their multiples only
    stored = parts["scales"].clone()
    if encoding.scale in EXPONENT_SCALES:
        scale = torch.ldexp(torch.ones(len(stored), dtype=torch.float64), stored.int() - 127)
        if encoding.scale != "LDEXP":
            scale[stored == 255] = torch.nan if encoding.scale == "E8M0" else torch.inf
            scale = scale.float()
    else:
        scale = stored.view(SCALE_DTYPES[encoding.scale]).float()
    if encoding.scale_of_scales != "none":
        common = parts["global"].clone().view(torch.float32)
        scale = scale * common if encoding.scale_of_scales == "multiplies" else scale / common
    return scale.view(down, across)


def _zeros(encoding: Encoding, zeros: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Zeros in the units of the codes' values, float32, `[down, across]`."""
    down, across = encoding.grid(rows, columns)
    if encoding.zero == "floats":
        return zeros.clone().view(SCALE_DTYPES[encoding.scale]).float().view(down, across)
    if encoding.zero == "bytes":
        return code_values(encoding.codes)[zeros.view(down, across).int() & ((1 << encoding.bits) - 1)]
    word = zeros.clone().view(torch.int32).view(-1, across)
    if encoding.bits == 3:
        number_XY = unpack_bits(word.t().contiguous().view(torch.uint8), 3, down)
        return code_values(encoding.codes)[number_XY.t()]
    num_codes = 8 * WORD_BYTES // encoding.bits
    shift = encoding.bits * torch.arange(num_codes, dtype=torch.int32)
    number = (word[:, None, :] >> shift[None, :, None]) & ((1 << encoding.bits) - 1)
    return code_values(encoding.codes)[number.reshape(-1, across)[:down]]


def group_order(order: torch.Tensor, groups: int) -> torch.Tensor:
    """The group of each column, int64, from its stored bytes.

    Raises:
        ValueError: if a number is that of no group.
    """
    group_C = order.clone().view(torch.int32).long()
    if bool(((group_C < 0) | (group_C >= groups)).any()):
        raise ValueError(f"columns name groups from {int(group_C.min())} to {int(group_C.max())}; there are {groups}")
    return group_C


def _group_of_column(encoding: Encoding, parts: Mapping[str, torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    if encoding.has_order:
        return group_order(parts["order"], encoding.grid(rows, columns)[1])
    return torch.arange(columns) // (encoding.group_columns or columns)


def _spread(value_XY: torch.Tensor, encoding: Encoding, rows: int, group_C: torch.Tensor) -> torch.Tensor:
    """A value of each group as a value of each weight, `[rows, columns]`."""
    return value_XY.repeat_interleave(encoding.group_rows or rows, dim=0)[:rows, group_C]
