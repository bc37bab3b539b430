"""Floats of four bits (E2M1): which spelling has which scales."""

from dataclasses import replace

from ...codes.encoding import EXPONENT_SCALES, Encoding
from ..tensors import TensorEntry
from .description import Quantisation
from .found import Companions, Found, expect_shape, said, scale_name
from .read_bytes import scaled_bytes

MX_COLUMNS, NV_COLUMNS = 32, 16
"""Columns of a group: by the OCP standard of microscaling formats, and of NVFP4."""


def fused_blocks(codes: TensorEntry, companions: Companions, described: Quantisation) -> Found:
    """gpt-oss: `[E, rows, groups, 16]` bytes, whose rows are the columns of the model's parameter."""
    *lead, rows, groups, nbytes = codes.shape if len(codes.shape) >= 3 else (0, 0, 0)
    if nbytes != MX_COLUMNS // 2:
        raise ValueError(f"{said(codes)}: expected [..., rows, groups, {MX_COLUMNS // 2}]")
    expect_shape(companions["scales"], (*lead, rows, groups), codes)
    encoding = Encoding(codes="e2m1", group_rows=1, group_columns=MX_COLUMNS, scale="LDEXP", product="F64")
    columns = groups * MX_COLUMNS
    return Found(encoding=encoding, shape=(*lead, columns, rows), rows=rows, columns=columns, is_transposed=True)


def packed_floats(codes: TensorEntry, companions: Companions, described: Quantisation) -> Found:
    """compressed-tensors: two E2M1 in a byte, low half first; a scale of scales, a divisor, makes it NVFP4."""
    encoding, scale = _e2m1(codes, companions, divides=True), companions["scales"]
    if encoding.scale in EXPONENT_SCALES:
        encoding = replace(encoding, product="BF16")
    return _of_halved_codes(codes, encoding, scale)


def whole_bytes(codes: TensorEntry, companions: Companions, described: Quantisation) -> Found:
    """Bytes beside a scale: E2M1 pairs of ModelOpt (U8) and DeepSeek (I8), or integers."""
    scale = companions["scales"]
    halved = _of_halved_shape(codes, scale, MX_COLUMNS)
    if codes.dtype == "U8" or (halved and scale.dtype in ("F8_E8M0", "U8")):
        return _of_halved_codes(codes, _e2m1(codes, companions, divides=False), scale)
    return scaled_bytes(codes, companions, described)


def _e2m1(codes: TensorEntry, companions: Companions, *, divides: bool) -> Encoding:
    """Groups of 16 with scales of E4M3 and a scale of scales, or of 32 with exponents and none."""
    scale = companions["scales"]
    if "global" in companions:
        if scale.dtype != "F8_E4M3" or companions["global"].dtype != "F32":
            raise ValueError(f"{said(scale)}: NVFP4 needs scales of F8_E4M3 and a scale of scales of F32")
        kind = "divides" if divides else "multiplies"
        group = NV_COLUMNS
        return Encoding(codes="e2m1", group_rows=1, group_columns=group, scale="E4M3", scale_of_scales=kind)
    if scale.dtype == "F8_E4M3":
        raise ValueError(f"{said(codes)}: scales of F8_E4M3 need a scale of scales beside {scale.name}")
    return Encoding(codes="e2m1", group_rows=1, group_columns=MX_COLUMNS, scale=scale_name(scale, ("E8M0", "EXP2")))


def _of_halved_codes(codes: TensorEntry, encoding: Encoding, scale: TensorEntry) -> Found:
    shape = _of_halved_shape(codes, scale, encoding.group_columns)
    if shape is None:
        raise ValueError(
            f"{said(scale)}: does not fit {codes.name} {list(codes.shape)} of two codes in a byte and groups of "
            f"{encoding.group_columns} columns"
        )
    return Found(encoding=encoding, shape=shape, rows=shape[-2], columns=shape[-1])


def _of_halved_shape(codes: TensorEntry, scale: TensorEntry, group: int) -> tuple[int, ...] | None:
    """The plain shape, if there is a scale for each group of the columns that pairs of codes make."""
    if len(codes.shape) < 2:
        return None
    columns = codes.shape[-1] * (1 if codes.dtype == "F4" else 2)
    is_whole = columns % group == 0 and scale.shape == (*codes.shape[:-1], columns // group)
    return (*codes.shape[:-1], columns) if is_whole else None
