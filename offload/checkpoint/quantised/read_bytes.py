"""Codes of eight bits, floats or integers: which weights share a scale."""

from ...codes.encoding import EXPONENT_SCALES, ITEM_BYTES, Encoding
from ..tensors import TensorEntry
from .description import Quantisation
from .found import Companions, Found, expect_shape, said, scale_name
from .values import integer_in

MX_COLUMNS = 32
"""Columns of a group, by the OCP standard of microscaling formats."""
USUAL_BLOCK = (128, 128)
"""Of FP8 weights whose description names no block: what transformers takes, too."""


def scaled_bytes(codes: TensorEntry, companions: Companions, described: Quantisation) -> Found:
    """Floats or integers of eight bits with a scale for each block, row, group or tensor."""
    scale = companions["scales"]
    name = scale_name(scale, ("F32", "BF16", "F16", "E8M0", "EXP2"))
    if len(codes.shape) < 2:
        raise ValueError(f"{said(codes)}: expected a matrix")
    rows, columns = codes.shape[-2:]
    group_rows, group_columns = _grid(codes, scale, described, is_exponent=name in EXPONENT_SCALES)
    product = (name if ITEM_BYTES[name] > 1 else "BF16") if described.rounds_in_scale else "F32"
    encoding = Encoding(
        codes="int8" if codes.dtype == "I8" else "e4m3",
        group_rows=group_rows,
        group_columns=group_columns,
        scale=name,
        product=product,
    )
    return Found(encoding=encoding, shape=codes.shape, rows=rows, columns=columns)


def bytes_of_127(codes: TensorEntry, companions: Companions, described: Quantisation) -> Found:
    """LLM.int8 of bitsandbytes: the scale of a row is what 127 stands for."""
    scale = companions["scales"]
    if "layout" in companions and (layout := integer_in(companions["layout"])) != 0:
        raise ValueError(f"{companions['layout'].name}: names the order of weights {layout}; 0 is known, which is rows")
    expect_shape(scale, codes.shape[:-1], codes)
    scale_name(scale, ("F32",))
    encoding = Encoding(codes="int8", group_rows=1, group_columns=0, scale="F32", product="F127")
    return Found(encoding=encoding, shape=codes.shape, rows=codes.shape[-2], columns=codes.shape[-1])


def _grid(codes: TensorEntry, scale: TensorEntry, described: Quantisation, *, is_exponent: bool) -> tuple[int, int]:
    """Rows and columns that share a scale, 0 for all of them.

    Raises:
        ValueError: if the scales fit neither the blocks that the config names nor whole rows, columns or tensors.
    """
    *lead, rows, columns = codes.shape
    if scale.shape in ((), (1,), (*lead,)):
        return 0, 0
    found = scale.shape[len(lead) :] if [*scale.shape[: len(lead)]] == lead else ()
    blocks = described.blocks or (USUAL_BLOCK,)
    groups = [(1, size) for size in described.groups] + ([(1, MX_COLUMNS)] if is_exponent else [])
    # one scale in two dimensions is what is left of a cut grid, if blocks are named
    wholes = [(1, 0), (0, 1)] if described.blocks else [(1, 0), (0, 1), (0, 0)]
    for group in (*blocks, *groups, *wholes):
        probe = Encoding(codes="e4m3", group_rows=group[0], group_columns=group[1], scale="F32")
        down, across = probe.grid(rows, columns)
        if found == (down, across) or (found == (down,) and across == 1):
            return group
    named = ", ".join(f"{down}x{across}" for down, across in blocks)
    raise ValueError(
        f"{said(scale)}: no scale for each block ({named}), row or group of {codes.name} {list(codes.shape)}"
    )
