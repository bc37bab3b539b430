"""Bindings of the C that routers use: top-k, the best of a grid, a recurrent router's scored steps, resident sets."""

import ctypes
import functools
from pathlib import Path

from ..ground.c_library import compile_library


@functools.cache
def routing_kernels() -> ctypes.CDLL | None:
    """The compiled library with the types of its functions set; None without a C compiler."""
    folder = Path(__file__).parent
    names = ("top_k", "grid_best", "scored_steps", "resident_scan")
    try:
        found = compile_library(tuple(folder / f"{name}.c" for name in names))
    except OSError:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    found.expertier_top_experts.argtypes = [pointer, number, number, number, pointer]
    found.expertier_scored_steps.argtypes = [pointer] * 13 + [number] * 4
    found.expertier_resident_scan.argtypes = [pointer] * 4 + [number] * 5 + [ctypes.c_float]
    found.expertier_grid_best.argtypes = [pointer]
    found.expertier_resident_scan.restype, found.expertier_grid_block.restype = None, number
    found.expertier_top_experts.restype = found.expertier_scored_steps.restype = ctypes.c_int
    return found
