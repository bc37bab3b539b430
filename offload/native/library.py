"""The C of this package, compiled when it is first needed, for the instruction sets of this processor."""

import ctypes
import functools
import os
import platform
from pathlib import Path
from typing import Any

from routing import compile_library
from routing.ground.expect import expect_name

FOLDER = Path(__file__).parent
SOURCES = tuple(
    FOLDER / name
    for name in (
        *("products.c", "compress.c", "norms.c", "expand.c", "gguf.c", "ternary.c"),
        *(
            "layers/layer.c",
            "layers/attend.c",
            "layers/choice.c",
            "layers/routed.c",
            "layers/ending.c",
            "layers/router.c",
        ),
        *("tuning/low_rank.c", "tuning/gates.c", "tuning/directions.c", "tuning/gradients.c"),
    )
)
HEADERS = tuple(sorted(FOLDER.rglob("*.h")))

POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64
"""Types of arguments: an address, and a count, a size or a stride."""

FORBIDDING = "EXPERTIER_WITHOUT"
"""Environment variable: instruction sets, separated by commas, that our C must not use."""
WITHOUT: dict[str, tuple[str, ...]] = {
    "amx": ("-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8"),
    "avx512_bf16": ("-mno-avx512bf16",),
    "avx512_vbmi": ("-mno-avx512vbmi", "-mno-avx512vbmi2"),
    "avx512": ("-mno-avx512f",),
    "avx2": ("-mno-avx2", "-mno-fma"),
}
"""What the compiler is told for each; it forbids what depends on a set together with it."""


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled library. A product and a sum are not contracted to one instruction, which would round once, not
    twice.

    Raises:
        OSError: if there is no C compiler, or it fails.
        ValueError: if an instruction set is forbidden that is not known.
    """
    return compile_library(SOURCES, headers=HEADERS, flags=["-ffp-contract=off", *_forbidden_flags()])


def _forbidden_flags() -> list[str]:
    names = [name for name in os.environ.get(FORBIDDING, "").split(",") if name]
    for name in names:
        expect_name(name, WITHOUT, "instruction set")
    is_x86 = platform.machine() in ("x86_64", "AMD64")
    return [flag for name in names for flag in WITHOUT[name] if is_x86]


def c_function(name: str, *types: Any, result: Any = None) -> Any:
    """A function of the library; None on a machine without a C compiler, or where it fails.

    Args:
        name: of the function in C.
        types: of its arguments, as ctypes has them.
        result: likewise, of what it returns; None for void.

    Raises:
        ValueError: if an instruction set is forbidden that is not known.
    """
    try:
        function = library()[name]  # an object of its own at each call, so that nobody else sets its types
    except OSError:
        return None
    function.argtypes, function.restype = types, result
    return function
