"""One token's bfloat16 matrix-vector products at the speed of memory: a small C file, compiled when it is first needed.

The products differ from torch's in the last bits (another order of summation), so this is chosen by
`arithmetic="fast"`; the results are the same at every cache size, like those of the exact arithmetic.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

SOURCE = Path(__file__).with_name("fast_linear.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


def matvec(x_1D: torch.Tensor, weight_FD: torch.Tensor, out_1F: torch.Tensor) -> None:
    """`out = x @ weight.T` for one row, all bfloat16 and contiguous on the CPU.

    Raises:
        ValueError: if there is no C compiler.
    """
    _library()(x_1D.data_ptr(), weight_FD.data_ptr(), out_1F.data_ptr(), *weight_FD.shape)


def fits_matvec(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `matvec` can do this product."""
    return (
        rows.numel() == weight.shape[-1]
        and rows.dtype == weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.is_contiguous()
        and rows.is_contiguous()
    )


def quicken_linears(model: nn.Module) -> int:
    """Let the resident linear layers of a model use `matvec` for single tokens; gives how many there are."""
    _library()
    linears = [
        module for module in model.modules() if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16
    ]
    for module in linears:
        module.forward = functools.partial(_linear, module, module.forward)  # type: ignore[method-assign]
    return len(linears)


def _linear(module: nn.Linear, otherwise: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if not fits_matvec(x, module.weight):
        return otherwise(x)
    out = x.new_empty(*x.shape[:-1], module.out_features)
    matvec(x, module.weight, out)
    return out if module.bias is None else out.add_(module.bias)


@functools.cache
def _library() -> Callable[[int, int, int, int, int], None]:
    """Compile once per processor and source into the user's cache, and load."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise ValueError('arithmetic="fast" compiles a small C file and found no C compiler (cc); use "exact"')
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "expertier"
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(SOURCE.read_bytes() + _processor() + " ".join(FLAGS).encode()).hexdigest()[:16]
    target = folder / f"fast_linear-{key}.so"
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = Path(work) / "fast_linear.so"
            done = subprocess.run([compiler, *FLAGS, "-o", built, SOURCE], capture_output=True, text=True, check=False)
            if done.returncode:
                raise ValueError(f'arithmetic="fast" could not be compiled: {done.stderr.strip()[:300]}; use "exact"')
            built.replace(target)
    function: Any = ctypes.CDLL(str(target)).expertier_matvec_bf16
    function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2
    function.restype = None

    def call(x: int, weight: int, out: int, rows: int, columns: int) -> None:
        function(weight, x, out, rows, columns)

    return call


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith("flags")), "").encode()
