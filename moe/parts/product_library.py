"""Which library multiplies matrices on this processor, by number format: measured once, and remembered in a file.

torch asks MKL for float32 and oneDNN for bfloat16. Neither is best everywhere: MKL uses half of the vector units of
AVX-512 processors that Intel did not make, and oneDNN has no bfloat16 product for processors without AVX-512.

A choice changes the last bits of a product. So it is remembered, and a run goes on tomorrow as it would have today.
Where nothing can be remembered, the processor's maker decides, without a clock.
"""

import functools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from routing import processor_fact
from routing.ground.files import write_json

Library = Literal["torch", "onednn", "float32"]
"""`torch` is `torch.mm` as it is, `float32` the same on widened numbers, rounded afterwards."""

ROWS, INPUTS, OUTPUTS = 256, 512, 1024
"""The product that is timed: a block of an expert of the presets. One product decides for all sizes; in
experiments/records/2026-11-29_training-throughput both libraries kept their ratio over the sizes of a training step."""
TURNS = 16
"""Timings of each library, in turns: 0.2 s on a busy machine, once; 40 such measurements beside ten busy processes came
to the same choice."""
GAIN = 1.25
"""How much quicker another library must be than torch's own choice in three of four turns, so that noise does not
change bits. MKL and oneDNN are within 1.1 of each other on Intel's processors, and 2 apart where it matters."""
MAX_FILE_BYTES = 1 << 20
"""A processor takes 150 bytes; a longer file is not ours."""


@functools.cache
def library_of(dtype: torch.dtype) -> Library:
    """Who multiplies matrices of this number format on the CPU.

    Args:
        dtype: of both factors; formats other than float32 and bfloat16 are torch's.
    """
    others = _others(dtype)
    if not others:
        return "torch"
    name, key = str(dtype).removeprefix("torch."), _processor()
    known = _remembered().get(key, {}).get(name)
    if known in ("torch", *others):
        return known
    found = fastest({"torch": torch.mm} | {other: PRODUCTS[other] for other in others}, dtype)
    return found if _remember(key, name, found) else library_by_maker(dtype)


def fastest(products: Mapping[Library, Callable[[Tensor, Tensor], Tensor]], dtype: torch.dtype) -> Library:
    """The library that is `GAIN` times quicker than torch's own choice, the quickest of several; else torch.

    Processor time of one thread is measured: what other processes and threads do to wall-clock time is no property of a
    library.

    Args:
        products: by library, `torch` among them.
        dtype: of the factors that are multiplied.
    """
    left_NI, right_IO = torch.ones(ROWS, INPUTS, dtype=dtype), torch.ones(OUTPUTS, INPUTS, dtype=dtype).T
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        turns = [_turn(products, left_NI, right_IO) for _ in range(1 + TURNS)][1:]  # the first allocates and builds
    finally:
        torch.set_num_threads(threads)
    gains = {library: sorted(turn["torch"] / turn[library] for turn in turns)[TURNS // 4] for library in products}
    best = max(gains, key=lambda library: gains[library])
    return best if gains[best] >= GAIN else "torch"


def _turn(
    products: Mapping[Library, Callable[[Tensor, Tensor], Tensor]], left_NI: Tensor, right_IO: Tensor
) -> dict[Library, float]:
    """Seconds of this thread for one product by each library."""
    seconds: dict[Library, float] = {}
    for library, product in products.items():
        began = time.thread_time()
        product(left_NI, right_IO)
        seconds[library] = max(time.thread_time() - began, 1e-9)
    return seconds


def library_by_maker(dtype: torch.dtype) -> Library:
    """Without a measurement: oneDNN for float32 on AVX-512 processors that Intel did not make."""
    is_other = processor_fact("vendor_id") not in ("", "GenuineIntel")
    is_wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "onednn" if "onednn" in _others(dtype) and is_other and is_wide else "torch"


def multiply_by_onednn(left_NI: Tensor, right_IO: Tensor) -> Tensor:
    """`left @ right` by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(left_NI, right_IO.T, None, "none", [], "")


def multiply_widened(left_NI: Tensor, right_IO: Tensor) -> Tensor:
    """`left @ right` in float32, rounded to the factors' format once."""
    return torch.mm(left_NI.float(), right_IO.float()).to(left_NI.dtype)


PRODUCTS: dict[Library, Callable[[Tensor, Tensor], Tensor]] = {
    "torch": torch.mm,
    "onednn": multiply_by_onednn,
    "float32": multiply_widened,
}


def _others(dtype: torch.dtype) -> tuple[Library, ...]:
    """Libraries besides torch's own choice that this build can ask."""
    if dtype == torch.float32 and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available():
        return ("onednn",)
    return ("float32",) if dtype == torch.bfloat16 else ()


def _processor() -> str:
    """What a measurement holds for."""
    model = processor_fact("model name") or processor_fact("vendor_id")
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def _file() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "expertier" / "products.json"


def _remembered() -> dict[str, Any]:
    """What earlier processes measured, by processor; nothing where that cannot be read."""
    try:
        if _file().stat().st_size > MAX_FILE_BYTES:
            return {}
        found = json.loads(_file().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home folder
        return {}
    is_table = isinstance(found, dict) and all(isinstance(value, dict) for value in found.values())
    return found if is_table else {}


def _remember(key: str, name: str, library: Library) -> bool:
    """Whether the choice is on disk now; what another process has written meanwhile stays."""
    known = _remembered()
    if known.get(key, {}).get(name) not in PRODUCTS:
        known[key] = known.get(key, {}) | {name: library}
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_json(_file(), known)
    except (OSError, RuntimeError):
        return False
    return _remembered().get(key, {}).get(name) == library
