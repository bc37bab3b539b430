"""The C of this package, compiled when it is first needed."""

import ctypes
import functools
from pathlib import Path

from routing import compile_library

FOLDER = Path(__file__).parent
SOURCES = tuple(FOLDER / name for name in ("matvec.c", "compress.c", "norms.c", "expand.c", "gguf.c"))
HEADERS = (
    *(FOLDER / "bfloat16.h", FOLDER / "compressed.h", FOLDER / "stored_matrix.h"),
    *(FOLDER / "forms" / name for name in ("scales.h", "nibbles.h", "bytes.h", "gguf.h")),
)


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library. A product and a sum are not contracted to one instruction, which would round once, not
    twice.

    Raises:
        OSError: if there is no C compiler, or it fails.
    """
    return compile_library(SOURCES, headers=HEADERS, flags=["-ffp-contract=off"])


@functools.cache
def compression_kernels() -> ctypes.CDLL | None:
    """The library with the types of `expertier_compress` and `expertier_expand` set; None without a C compiler."""
    try:
        found = library()
    except OSError:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.expertier_compress.argtypes = [pointer, number, number, number, pointer, pointer]
    found.expertier_compress.restype = number
    found.expertier_expand.argtypes = [pointer, number, number, pointer]
    found.expertier_expand.restype = None
    return found
