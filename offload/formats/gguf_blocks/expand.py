"""Bytes of a GGUF file as numbers: by our C where it knows the type, else by the `gguf` package that defines them."""

import ctypes
from functools import cache
from typing import Any

import numpy as np
import torch

from ...checkpoint.gguf.library import gguf_library
from ...checkpoint.tensors import TensorEntry, read_into
from ...native.library import NUMBER, POINTER, c_function

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""Types that hold numbers as they are."""
STRIP_BYTES = 16 << 20
"""Bytes of float32 that are expanded at a time without our C: the package makes several arrays of that size."""


def expand_rows(kind: str, stored: torch.Tensor, out_FD: torch.Tensor) -> None:
    """Write rows of a matrix, each number rounded once to the dtype of `out_FD`.

    Args:
        kind: name of the type in ggml.
        stored: uint8 and contiguous, the rows one after the other.
        out_FD: any floating dtype, on the CPU; rows may be apart.
    """
    if kind in PLAIN:
        out_FD.copy_(stored.view(PLAIN[kind]).view(out_FD.shape))
        return
    is_in_rows = out_FD.dtype == torch.bfloat16 and out_FD.stride(1) == 1
    if is_in_rows and (function := _expander(kind)) is not None:
        number = gguf_library().GGMLQuantizationType[kind].value
        function(number, stored.data_ptr(), *out_FD.shape, out_FD.data_ptr(), out_FD.stride(0))
        return
    rows, columns = out_FD.shape
    stored_FB = stored.view(rows, -1)
    step = max(1, STRIP_BYTES // (4 * columns))
    for first in range(0, rows, step):
        values_FD = dequantise(kind, stored_FB[first : first + step].numpy())
        out_FD[first : first + step] = torch.from_numpy(values_FD)


def dequantise(kind: str, stored_FB: np.ndarray) -> np.ndarray:
    """Float32 numbers of stored rows by the `gguf` package; this defines every type."""
    gguf = gguf_library()
    with np.errstate(all="ignore"):  # scales of a damaged block may be infinite or no number
        found: np.ndarray = gguf.quants.dequantize(stored_FB, gguf.GGMLQuantizationType[kind])
    return found


def expand_tensor(entry: TensorEntry, dtype: torch.dtype) -> torch.Tensor:
    """Read a tensor of a GGUF file and expand it, a strip of rows at a time.

    Raises:
        OSError: if reading fails.
    """
    columns = entry.shape[-1]
    out_FD = torch.empty(entry.shape, dtype=dtype).view(-1, columns)
    row_bytes = entry.nbytes // len(out_FD)
    step = max(1, STRIP_BYTES // row_bytes)
    buffer = torch.empty(min(step, len(out_FD)) * row_bytes, dtype=torch.uint8)
    with entry.file.open("rb", buffering=0) as stream:
        for first in range(0, len(out_FD), step):
            rows_FD = out_FD[first : first + step]
            stored = buffer[: len(rows_FD) * row_bytes]
            read_into(entry.file, stream.fileno(), entry.offset + first * row_bytes, stored.numpy().data)
            expand_rows(entry.dtype, stored, rows_FD)
    return out_FD.view(entry.shape)


def has_expander(kind: str) -> bool:
    """Whether our C expands a type."""
    return kind not in PLAIN and _expander(kind) is not None


@cache
def kernel_parameter(kind: str) -> Any:
    """What our C makes of a matrix of a type: its number, in the first of four int32."""
    return (ctypes.c_int32 * 4)(gguf_library().GGMLQuantizationType[kind].value)


@cache
def _expander(kind: str) -> Any:
    """Our C for a type; None if it has none, or there is no C compiler."""
    knows = c_function("expertier_expands_gguf", ctypes.c_int, result=ctypes.c_int)
    if knows is None or not knows(gguf_library().GGMLQuantizationType[kind].value):
        return None
    return c_function("expertier_expand_gguf", ctypes.c_int, POINTER, NUMBER, NUMBER, POINTER, NUMBER)
