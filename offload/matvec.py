"""One token's bfloat16 matrix-vector products at the speed of memory: a small C file, compiled when it is first needed.

torch's own products of one row read weights at about half the speed of memory. A kernel of ours takes their place where
its results are the same, bit for bit: each shape is tried against torch's product when it first occurs, with the number
of threads then in use. `arithmetic="fast"` uses it also where the last bits differ.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

SOURCE = Path(__file__).with_name("matvec.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC")
AMX_BLOCK = 32
TRIALS = 4
ARITHMETICS = ("exact", "fast")

Kernel = Callable[[torch.Tensor, Sequence[torch.Tensor], torch.Tensor], None]
ExpertsKernel = Callable[..., None]


class Matvecs:
    """Chooses a kernel for each shape.

    Args:
        arithmetic: `exact` or `fast`.

    Raises:
        ValueError: if the arithmetic is unknown, or `fast` and there is no C compiler.
    """

    def __init__(self, arithmetic: str) -> None:
        if arithmetic not in ARITHMETICS:
            raise ValueError(f"arithmetic must be one of {', '.join(ARITHMETICS)}; got {arithmetic!r}")
        self.arithmetic = arithmetic
        self._chosen: dict[tuple[int, int, int], Kernel | None] = {}
        try:
            self._kernels = _kernels()
        except OSError as error:
            if arithmetic == "fast":
                raise ValueError(f'arithmetic="fast": {error}; use "exact"') from error
            self._kernels = {}

    def multiply(self, x_ND: torch.Tensor, weights_FD: Sequence[torch.Tensor], out_NF: torch.Tensor) -> bool:
        """`out[n] = weights[n] @ x[n]`, if a kernel fits; otherwise nothing happens and the result is False.

        Args:
            x_ND: one row for each product.
            weights_FD: N matrices of one shape.
            out_NF: where the results go.
        """
        first_FD = weights_FD[0]
        if not (self._kernels and _fits(x_ND, weights_FD)):
            return False
        kernel = self._kernel(first_FD)
        if kernel is None:
            return False
        kernel(x_ND, weights_FD, out_NF)
        return True

    def experts_kernel(self, up_FD: torch.Tensor, down_DF: torch.Tensor) -> ExpertsKernel | None:
        """The kernel of whole experts, if both of their products are computed by the same one.

        Args:
            up_FD, down_DF: weights of the shapes in question.
        """
        chosen = {self._kernel(up_FD), self._kernel(down_DF)} if self._kernels else {None}
        kernel = chosen.pop()
        return None if chosen or kernel is None else _experts_kernels()[_name(kernel)]

    @property
    def names(self) -> dict[str, str]:
        """What computes each shape met so far, for the report."""
        return {f"{rows}x{columns}": _name(kernel) for (rows, columns, _), kernel in self._chosen.items()}

    def _kernel(self, weight_FD: torch.Tensor) -> Kernel | None:
        key = (*weight_FD.shape, torch.get_num_threads())
        if key not in self._chosen:
            self._chosen[key] = self._choose(weight_FD)
        return self._chosen[key]

    def _choose(self, weight_FD: torch.Tensor) -> Kernel | None:
        rows, columns = weight_FD.shape
        candidates = [
            kernel
            for name, kernel in self._kernels.items()
            if name != "amx" or rows % AMX_BLOCK == columns % AMX_BLOCK == 0
        ]
        if self.arithmetic == "exact":
            candidates = [kernel for kernel in candidates if _has_the_bits_of_torch(kernel, weight_FD)]
        return next(iter(candidates), None)


def quicken_linears(model: nn.Module, matvecs: Matvecs) -> None:
    """Let the resident bfloat16 linear layers of a model multiply single tokens by `matvecs`."""
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16:
            module.forward = functools.partial(_linear, module, module.forward, matvecs)  # type: ignore[method-assign]


def _linear(module: nn.Linear, otherwise: Callable[[torch.Tensor], torch.Tensor], matvecs: Matvecs, x: Any) -> Any:
    learns = torch.is_grad_enabled() and (x.requires_grad or module.weight.requires_grad)
    if x.numel() != module.in_features or module.bias is not None or learns:
        return otherwise(x)
    out = x.new_empty(*x.shape[:-1], module.out_features)
    return out if matvecs.multiply(x, (module.weight,), out) else otherwise(x)


def _fits(x: torch.Tensor, weights_FD: Sequence[torch.Tensor]) -> bool:
    return (
        x.numel() == len(weights_FD) * weights_FD[0].shape[-1]
        and x.dtype == torch.bfloat16
        and x.is_contiguous()
        and all(
            weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()
            for weight in weights_FD
        )
    )


def _has_the_bits_of_torch(kernel: Kernel, weight_FD: torch.Tensor) -> bool:
    generator = torch.Generator().manual_seed(0)
    expected_1F, found_1F = (weight_FD.new_empty(1, weight_FD.shape[0]) for _ in range(2))
    for trial in range(TRIALS):
        x_1D = torch.randn(1, weight_FD.shape[1], generator=generator).mul_(10.0 ** (trial - 2)).bfloat16()
        torch.mm(x_1D, weight_FD.t(), out=expected_1F)
        kernel(x_1D, (weight_FD,), found_1F)
        if not torch.equal(expected_1F, found_1F) or not torch.equal(
            nn.functional.linear(x_1D[None], weight_FD)[0], found_1F
        ):
            return False
    return True


def _name(kernel: Kernel | None) -> str:
    return "torch" if kernel is None else next(name for name, ours in _kernels().items() if ours is kernel)


@functools.cache
def _kernels() -> dict[str, Kernel]:
    """Our kernels that this processor runs, best first. Raises OSError if there is no C compiler or it fails."""
    library = _library()
    library.expertier_matvec.argtypes = [ctypes.c_int] + [ctypes.c_int64] + [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2
    library.expertier_matvec.restype = None
    return {name: _matvec(library.expertier_matvec, is_amx) for name, is_amx in _arithmetics(library).items()}


@functools.cache
def _experts_kernels() -> dict[str, ExpertsKernel]:
    """Whole experts, by the same names."""
    library = _library()
    function = library.expertier_experts
    function.argtypes = (
        [ctypes.c_int, ctypes.c_int64]
        + [ctypes.c_void_p] * 4
        + [ctypes.c_int]
        + [ctypes.c_void_p] * 2
        + [ctypes.c_int64] * 2
    )
    function.restype = None
    return {name: functools.partial(function, is_amx) for name, is_amx in _arithmetics(library).items()}


def _arithmetics(library: ctypes.CDLL) -> dict[str, bool]:
    return ({"amx": True} if library.expertier_has_amx() else {}) | {"dot": False}


def _matvec(function: Any, is_amx: bool) -> Kernel:
    def call(x_ND: torch.Tensor, weights_FD: Sequence[torch.Tensor], out_NF: torch.Tensor) -> None:
        places = pointers(weights_FD)
        function(is_amx, len(weights_FD), places, x_ND.data_ptr(), out_NF.data_ptr(), *weights_FD[0].shape)

    return call


@functools.cache
def touch() -> Callable[[int, int], None] | None:
    """Reads `bytes` at an address, without holding Python's lock; None without a C compiler."""
    try:
        function = _library().expertier_touch
    except OSError:
        return None
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64], None
    return function


def pointers(tensors: Sequence[torch.Tensor]) -> Any:
    """Where tensors lie, as C takes it."""
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


@functools.cache
def _library() -> ctypes.CDLL:
    """Compile once per processor and source into the user's cache, and load."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler (cc) was found for a small C file")
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "expertier"
    folder.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256(SOURCE.read_bytes() + _processor() + " ".join(FLAGS).encode()).hexdigest()[:16]
    target = folder / f"matvec-{key}.so"
    if not target.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            _compile(compiler, Path(work)).replace(target)
    return ctypes.CDLL(str(target))


def _compile(compiler: str, work: Path) -> Path:
    """The library, linked with torch's own OpenMP if that is visible: two pools of threads would disturb each other."""
    built, compiled = work / "matvec.so", work / "matvec.o"
    _run([compiler, *FLAGS, "-c", str(SOURCE), "-o", str(compiled)])
    for openmp in ((), ("-fopenmp",)):
        _run([compiler, "-shared", *openmp, str(compiled), "-o", str(built)])
        try:
            ctypes.CDLL(str(built))
            return built
        except OSError as error:
            problem = error
    raise problem


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{SOURCE.name} could not be compiled: {done.stderr.strip()[:300]}")


def _processor() -> bytes:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith("flags")), "").encode()
