"""How formats name the tensors of a quantised matrix, and how names, dtypes and shapes tell which encoding it has.

Names are matched by their endings, never by a model family. Which matrices of a checkpoint are quantised is decided
matrix by matrix, by the companions that are there: lists of excluded modules differ between tools.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod

from ...codes.encoding import EXPONENT_SCALES, ITEM_BYTES, Encoding
from ..tensors import TensorEntry
from .description import Quantisation

SCALE_NAMES = {"F32": "F32", "BF16": "BF16", "F16": "F16", "F8_E4M3": "E4M3", "F8_E8M0": "E8M0", "U8": "EXP2"}
MX_COLUMNS, NV_COLUMNS = 32, 16
USUAL_BLOCK = (128, 128)
"""Of FP8 weights whose description names no block: what transformers takes, too."""
WORD_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Found:
    """A quantised tensor whose encoding is known; `shape` is that of the plain tensor."""

    encoding: Encoding
    shape: tuple[int, ...]
    rows: int
    columns: int
    is_transposed: bool = False


Companions = Mapping[str, TensorEntry]
Reader = Callable[[TensorEntry, Companions, Quantisation], Found]


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """One way to name a quantised matrix.

    Args:
        ending: of the codes' name, which the plain tensor's name lacks.
        dtypes: safetensors dtypes that the codes may have.
        needed: ending of each companion, added to the plain tensor's name; one that begins with a dot takes the place
            of `.weight`. The first that is there counts.
        optional: the same for companions that may be missing.
        read: tells the encoding, or raises ValueError.
    """

    ending: str
    dtypes: tuple[str, ...]
    needed: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]]
    read: Reader


def _fused_blocks(codes: TensorEntry, companions: Companions, described: Quantisation) -> Found:
    """gpt-oss: `[E, rows, groups, 16]` bytes, whose rows are the columns of the model's parameter."""
    *lead, rows, groups, nbytes = codes.shape if len(codes.shape) >= 3 else (0, 0, 0)
    if nbytes != MX_COLUMNS // 2:
        raise ValueError(f"{_said(codes)}: expected [..., rows, groups, {MX_COLUMNS // 2}]")
    _expect_shape(companions["scales"], (*lead, rows, groups), codes)
    encoding = Encoding(codes="e2m1", group_rows=1, group_columns=MX_COLUMNS, scale="LDEXP", product="F64")
    columns = groups * MX_COLUMNS
    return Found(encoding=encoding, shape=(*lead, columns, rows), rows=rows, columns=columns, is_transposed=True)


def _packed_integers(codes: TensorEntry, companions: Companions, described: Quantisation) -> Found:
    """compressed-tensors: words of 32 bits along the columns, half of the range added to each code."""
    from .values import expect_usual_order, shape_in

    shape = shape_in(companions["shape"])
    lead, (rows, columns) = shape[:-2], shape[-2:]
    bits = next((bits for bits in (4, 8) if codes.shape == (*lead, rows, -(-columns * bits // WORD_BITS))), 0)
    if not bits:
        raise ValueError(
            f"{_said(codes)}: not {list(shape)} in codes of 4 or 8 bits, which {companions['shape'].name} names"
        )
    scales = companions["scales"]
    across = scales.shape[-1] if scales.shape else 1
    size = columns // across if across > 1 and columns % across == 0 else 0
    if size and described.groups and size not in described.groups:
        raise ValueError(f"{_said(scales)}: groups of {size} columns; the config names {described.groups}")
    encoding = Encoding(
        codes=f"offset{bits}",
        group_rows=1,
        group_columns=size,
        scale=_scale_name(scales, ("F32", "BF16", "F16")),
        product=_scale_name(scales, ("F32", "BF16", "F16")),
        zero="packed" if "zeros" in companions else "none",
        is_word_aligned=True,
    )
    if prod(scales.shape) == prod(lead):
        encoding = replace(encoding, group_rows=0)
    if "order" in companions:
        expect_usual_order(companions["order"], encoding.group_columns or columns)
    return Found(encoding=encoding, shape=shape, rows=rows, columns=columns)


def _packed_floats(codes: TensorEntry, companions: Companions, described: Quantisation) -> Found:
    """compressed-tensors: two E2M1 in a byte, low half first; a scale of scales, a divisor, makes it NVFP4."""
    encoding, scale = _e2m1(codes, companions, divides=True), companions["scales"]
    if encoding.scale in EXPONENT_SCALES:
        encoding = replace(encoding, product="BF16")
    return _of_halved_codes(codes, encoding, scale)


def _whole_bytes(codes: TensorEntry, companions: Companions, described: Quantisation) -> Found:
    """Bytes beside a scale: E2M1 pairs of ModelOpt (U8) and DeepSeek (I8), or integers."""
    scale = companions["scales"]
    halved = _of_halved_shape(codes, scale, MX_COLUMNS)
    if codes.dtype == "U8" or (halved and scale.dtype in ("F8_E8M0", "U8")):
        return _of_halved_codes(codes, _e2m1(codes, companions, divides=False), scale)
    return _scaled_bytes(codes, companions, described)


def _scaled_bytes(codes: TensorEntry, companions: Companions, described: Quantisation) -> Found:
    """Floats or integers of eight bits with a scale for each block, row, group or tensor."""
    scale = companions["scales"]
    name = _scale_name(scale, ("F32", "BF16", "F16", "E8M0", "EXP2"))
    if len(codes.shape) < 2:
        raise ValueError(f"{_said(codes)}: expected a matrix")
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


def _e2m1(codes: TensorEntry, companions: Companions, *, divides: bool) -> Encoding:
    """Groups of 16 with scales of E4M3 and a scale of scales, or of 32 with exponents and none."""
    scale = companions["scales"]
    if "global" in companions:
        if scale.dtype != "F8_E4M3" or companions["global"].dtype != "F32":
            raise ValueError(f"{_said(scale)}: NVFP4 needs scales of F8_E4M3 and a scale of scales of F32")
        kind = "divides" if divides else "multiplies"
        group = NV_COLUMNS
        return Encoding(codes="e2m1", group_rows=1, group_columns=group, scale="E4M3", scale_of_scales=kind)
    if scale.dtype == "F8_E4M3":
        raise ValueError(f"{_said(codes)}: scales of F8_E4M3 need a scale of scales beside {scale.name}")
    return Encoding(codes="e2m1", group_rows=1, group_columns=MX_COLUMNS, scale=_scale_name(scale, ("E8M0", "EXP2")))


def _of_halved_codes(codes: TensorEntry, encoding: Encoding, scale: TensorEntry) -> Found:
    shape = _of_halved_shape(codes, scale, encoding.group_columns)
    if shape is None:
        raise ValueError(
            f"{_said(scale)}: does not fit {codes.name} {list(codes.shape)} of two codes in a byte and groups of "
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
        f"{_said(scale)}: no scale for each block ({named}), row or group of {codes.name} {list(codes.shape)}"
    )


def _scale_name(scale: TensorEntry, allowed: tuple[str, ...]) -> str:
    name = SCALE_NAMES.get(scale.dtype)
    if name not in allowed:
        raise ValueError(f"{_said(scale)}: scales of this dtype are not known here")
    return name


def _expect_shape(entry: TensorEntry, shape: tuple[int, ...], beside: TensorEntry) -> None:
    if entry.shape != shape:
        raise ValueError(f"{_said(entry)}: expected {list(shape)} beside {beside.name} {list(beside.shape)}")


def _said(entry: TensorEntry) -> str:
    return f"{entry.name} {entry.dtype} {list(entry.shape)}"


SPELLINGS = (
    Spelling(ending="_blocks", dtypes=("U8",), needed={"scales": ("_scales",)}, optional={}, read=_fused_blocks),
    Spelling(
        ending="_packed",
        dtypes=("I32",),
        needed={"scales": ("_scale",), "shape": ("_shape",)},
        optional={"zeros": ("_zero_point",), "order": ("_g_idx",)},
        read=_packed_integers,
    ),
    Spelling(
        ending="_packed",
        dtypes=("U8", "F4"),
        needed={"scales": ("_scale",)},
        optional={"global": ("_global_scale",)},
        read=_packed_floats,
    ),
    Spelling(
        ending="",
        dtypes=("F8_E4M3",),
        needed={"scales": ("_scale_inv", "_scale", ".scale")},
        optional={},
        read=_scaled_bytes,
    ),
    Spelling(
        ending="",
        dtypes=("I8", "U8", "F4"),
        needed={"scales": ("_scale_inv", "_scale", ".scale")},
        optional={"global": ("_scale_2",)},
        read=_whole_bytes,
    ),
)
"""Tried in this order; the first whose ending, dtype and needed companions are there reads the tensor."""
IGNORED_ENDINGS = (
    *("input_scale", "input_global_scale", "activation_scale", "input_scale_ub", "output_scale"),
    *("k_scale", "v_scale", "q_scale", "prob_scale"),
)
"""Scales of activations and of the cache of keys and values: products here take both as they are."""
COMPANION_ENDINGS = (
    *("_scale", "_scale_inv", "_scale_2", "_scales", "_global_scale", "_zero_point", "_shape", "_g_idx", "_blocks"),
    *("_packed", ".scale", ".scales", ".qzeros", ".g_idx", ".absmax", ".quant_map"),
)
"""What names a companion: one that nothing consumed stands beside a tensor that would be read without it."""
