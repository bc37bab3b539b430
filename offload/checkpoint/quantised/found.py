"""What the readers of spellings share: the encoding that they find, and how they refuse what does not fit."""

from collections.abc import Mapping
from dataclasses import dataclass

from ...codes.stored_matrix import AnyEncoding
from ..tensors import TensorEntry

SCALE_NAMES = {"F32": "F32", "BF16": "BF16", "F16": "F16", "F8_E4M3": "E4M3", "F8_E8M0": "E8M0", "U8": "EXP2"}
Companions = Mapping[str, TensorEntry]


@dataclass(frozen=True, kw_only=True)
class Found:
    """A quantised tensor whose encoding is known; `shape` is that of the plain tensor."""

    encoding: AnyEncoding
    shape: tuple[int, ...]
    rows: int
    columns: int
    is_transposed: bool = False


def scale_name(scale: TensorEntry, allowed: tuple[str, ...]) -> str:
    name = SCALE_NAMES.get(scale.dtype)
    if name not in allowed:
        raise ValueError(f"{said(scale)}: scales of this dtype are not known here")
    return name


def expect_shape(entry: TensorEntry, shape: tuple[int, ...], beside: TensorEntry) -> None:
    if entry.shape != shape:
        raise ValueError(f"{said(entry)}: expected {list(shape)} beside {beside.name} {list(beside.shape)}")


def said(entry: TensorEntry) -> str:
    return f"{entry.name} {entry.dtype} {list(entry.shape)}"
