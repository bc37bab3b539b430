"""One token's bfloat16 matrix-vector products at the speed of memory: a small C file, compiled when it is first needed.

torch's own products of one row read weights at about half the speed of memory. A kernel of ours takes their place where
its results are the same, bit for bit: each shape is tried against torch's product when it first occurs, with the number
of threads then in use. `arithmetic="fast"` uses it also where the last bits differ.
"""

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ..formats.stored_weight import expanded, kernel_of, stored_bytes
from ..native import library as native

AMX_BLOCK = 32
"""Rows and columns that the AMX kernel takes at a time: two tiles of 16 rows, a tile row holds 32 bfloat16 numbers."""
TRIALS = 4
"""Random inputs, 0.01 to 10 in size, that a kernel is tried on with the given weight. They need not be many: the sums
of `_cancelling` tell two orders of summation apart by themselves."""
MOST_TRIED_ROWS = 4096
"""Rows of the trial that needs a weight of its own: that of a vocabulary would take 0.9 to 5 GB. With more rows than
that the given weight shows another order of summation by itself: one output in thousands differs, in each trial."""
ARITHMETICS = ("exact", "fast")
MEMORY_TYPES = (torch.Tensor, nn.Parameter)
"""`TokenWeight` is stripped of its type where it is multiplied."""

Kernel = Callable[[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]], None]
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

    def multiply(self, x_ND: torch.Tensor, weights_FD: Sequence[torch.Tensor], outs_F: Sequence[torch.Tensor]) -> bool:
        """`outs[n] = weights[n] @ x[n]`, if one kernel fits all; otherwise nothing happens and the result is False.

        Args:
            x_ND: one row for each product, or one row for all.
            weights_FD: N matrices of the same width, all in one stored form; their numbers of rows may differ.
            outs_F: where the results go, each contiguous.
        """
        if not (self._kernels and _fits(x_ND, weights_FD)):
            return False
        first, *others = {self._kernel((len(weight_FD), weight_FD.shape[1]), weight_FD) for weight_FD in weights_FD}
        if first is None or others:
            return False
        first(x_ND, weights_FD, outs_F)
        return True

    def experts_kernel(self, shapes: Sequence[tuple[int, int]]) -> ExpertsKernel | None:
        """The kernel of whole experts, if all of their products are computed by the same one.

        Args:
            shapes: rows and columns of each weight of an expert.
        """
        if not self._kernels:
            return None
        kernel, *others = {self._kernel(shape) for shape in shapes}
        return None if others or kernel is None else _experts_kernels()[_name(kernel)]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Matvecs":
        """Copies of a model share it: it holds nothing but which kernel was chosen."""
        return self

    @property
    def names(self) -> dict[str, str]:
        """What computes each shape met so far, for the report."""
        return {f"{rows}x{columns}": _name(kernel) for (rows, columns, _), kernel in self._chosen.items()}

    def _kernel(self, shape: tuple[int, int], weight_FD: torch.Tensor | None = None) -> Kernel | None:
        """What computes this shape; tried on the given weight, or on a random one."""
        key = (*shape, torch.get_num_threads())
        if key not in self._chosen:
            tried = torch.randn(shape).bfloat16() if weight_FD is None else weight_FD
            self._chosen[key] = self._choose(expanded(tried))
        return self._chosen[key]

    def _choose(self, weight_FD: torch.Tensor) -> Kernel | None:
        rows, columns = weight_FD.shape
        candidates = [
            kernel
            for name, kernel in self._kernels.items()
            if name != "amx" or rows % AMX_BLOCK == columns % AMX_BLOCK == 0
        ]
        if self.arithmetic == "exact":
            candidates = [kernel for kernel in candidates if _equals_torch(kernel, weight_FD)]
        return next(iter(candidates), None)


def is_in_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor's address is that of its numbers in host memory.

    Not so for fake tensors of compilers, tensors that a transform such as vmap has wrapped, and subclasses that
    compute something else than they hold. Those go to torch's own operations.
    """
    return (
        type(tensor) in MEMORY_TYPES
        and tensor.device.type == "cpu"
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _fits(x: torch.Tensor, weights_FD: Sequence[torch.Tensor]) -> bool:
    return (
        is_in_memory(x)
        and x.numel() in (weights_FD[0].shape[-1], len(weights_FD) * weights_FD[0].shape[-1])
        and x.dtype == torch.bfloat16
        and x.is_contiguous()
        and all(
            weight.dtype == torch.bfloat16
            and is_in_memory(stored_bytes(weight))
            and weight.is_contiguous()
            and weight.shape[-1] == weights_FD[0].shape[-1]
            and kernel_of(weight) is not None
            and kernel_of(weight) == kernel_of(weights_FD[0])
            for weight in weights_FD
        )
    )


def _equals_torch(kernel: Kernel, weight_FD: torch.Tensor) -> bool:
    """Whether a kernel is bit-identical to torch on the given weight, and on products that are rounding errors alone.

    The latter tell any two orders of summation apart. Of ordinary sums, rounded to bfloat16, only one in thousands
    differs.
    """
    generator = torch.Generator().manual_seed(0)
    rows, columns = weight_FD.shape
    given = [
        (torch.randn(1, columns, generator=generator).mul_(10.0 ** (trial - 2)).bfloat16(), weight_FD)
        for trial in range(TRIALS)
    ]
    few_rows = min(rows, MOST_TRIED_ROWS)
    return all(_agree(kernel, *operands) for operands in (*given, _cancelling(few_rows, columns, generator)))


def _agree(kernel: Kernel, x_1D: torch.Tensor, weight_FD: torch.Tensor) -> bool:
    expected_1F, found_1F = (weight_FD.new_empty(1, len(weight_FD)) for _ in range(2))
    torch.mm(x_1D, weight_FD.t(), out=expected_1F)
    kernel(x_1D, (weight_FD,), (found_1F,))
    linear_1F = nn.functional.linear(x_1D[None], weight_FD)[0]
    return torch.equal(expected_1F, found_1F) and torch.equal(linear_1F, found_1F)


def _cancelling(rows: int, columns: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, D] and [F, D] whose product would be 0 without rounding: every term comes a second time, negative."""
    half = columns // 2
    place_D = torch.randperm(columns, generator=generator)
    x_1D, weight_FD = torch.zeros(1, columns).bfloat16(), torch.zeros(rows, columns).bfloat16()
    x_1H = torch.randn(1, half, generator=generator).bfloat16()
    weight_FH = torch.randn(rows, half, generator=generator).bfloat16()
    for places, sign in ((place_D[:half], 1), (place_D[half : 2 * half], -1)):
        x_1D[:, places], weight_FD[:, places] = x_1H, sign * weight_FH
    return x_1D, weight_FD


def _name(kernel: Kernel | None) -> str:
    return "torch" if kernel is None else next(name for name, ours in _kernels().items() if ours is kernel)


@functools.cache
def _kernels() -> dict[str, Kernel]:
    """Our kernels that this processor runs, best first. Raises OSError if there is no C compiler or it fails."""
    library = native.library()
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.expertier_matvec.argtypes = [
        ctypes.c_int,
        ctypes.c_int,
        number,
        pointer,
        pointer,
        number,
        pointer,
        pointer,
        number,
    ]
    library.expertier_matvec.restype = None
    return {name: _matvec(library.expertier_matvec, is_amx) for name, is_amx in _arithmetics(library).items()}


@functools.cache
def _experts_kernels() -> dict[str, ExpertsKernel]:
    """Whole experts, by the same names."""
    library = native.library()
    function = library.expertier_experts
    function.argtypes = (
        [ctypes.c_int, ctypes.c_int, ctypes.c_int64]
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
    def call(x_ND: torch.Tensor, weights_FD: Sequence[torch.Tensor], outs_F: Sequence[torch.Tensor]) -> None:
        num, columns = len(weights_FD), weights_FD[0].shape[1]
        rows = (ctypes.c_int64 * num)(*[weight.shape[0] for weight in weights_FD])
        x_step = columns if x_ND.numel() > columns else 0
        place = pointers([stored_bytes(weight) for weight in weights_FD])
        function(is_amx, kernel_of(weights_FD[0]), num, place, x_ND.data_ptr(), x_step, pointers(outs_F), rows, columns)

    return call


def pointers(tensors: Sequence[torch.Tensor]) -> Any:
    """Where tensors lie, as C takes it."""
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
