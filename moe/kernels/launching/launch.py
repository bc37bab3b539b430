"""A kernel launch as a value: the same value is run on a device, run by the interpreter, or compiled ahead of time.

Every operation of this package describes its launch and hands it to `run`, which is `execute` in real use and
`list.append` when the launches of a layer are only to be looked at (with tensors on the meta device).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

Run = Callable[["Launch"], None]

ACCUMULATORS = {torch.float64: tl.float64}


@dataclass(frozen=True, eq=False)
class Launch:
    """One call of one kernel.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along each axis.
        arguments: every parameter of the kernel by name, constexpr ones included.
        num_warps, num_stages: warps per program, and steps of a loop that are loaded ahead.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3

    def options(self) -> dict[str, Any]:
        """The compiler's options; fusing multiply and add is stated because its default changes with Triton 3.10."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


def execute(launch: Launch) -> None:
    """Run on the device of the arguments, or in the interpreter where `TRITON_INTERPRET=1` was set at import."""
    launch.kernel[launch.grid](**launch.arguments, **launch.options())


def is_interpreted() -> bool:
    """Whether kernels of this process run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def arithmetic(dtype: torch.dtype) -> dict[str, Any]:
    """The constexpr arguments that say in which types a matrix product of `dtype` is computed.

    The interpreter keeps bfloat16 as its bits, so that arithmetic on it is meaningless: it computes in float32 there.
    """
    upcast = is_interpreted() and dtype == torch.bfloat16
    allow_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {
        "COMPUTE": tl.float32 if upcast else TRITON_TYPES[dtype],
        "ACCUMULATE": ACCUMULATORS.get(dtype, tl.float32),
        "PRECISION": "tf32" if allow_tf32 else "ieee",
    }


TRITON_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
