"""Root-mean-square norms: one call of C, bit-identical to torch's seven operations, and their gradients."""

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..native.library import NUMBER, POINTER, c_function
from .matvec import is_in_memory

EPSILONS = ("variance_epsilon", "eps", "epsilon")
MOST_ELEMENTS = 1 << 15
"""From here on torch's elementwise operations use all threads (its grain is 2^15 elements), and ours uses one."""
TRIED_POWERS = range(-2, 4)
"""Powers of ten that the trial inputs are scaled by. Small ones show where the epsilon is added."""
TRIED_SUMS = 64
"""Sums that are compared with torch's. In float32 another order of summation often changes the last bit, so that 64
equal sums do not come by chance."""

Forward = Callable[..., torch.Tensor]


def quicken_norms(model: nn.Module) -> None:
    """Let the bfloat16 norms of a model that compute `weight * (x / rms(x))` do it by our kernel on single tokens.

    What a module computes is found out by trying: both places of the rounding before the product with the weight, on
    numbers of several magnitudes. A module that is bit-identical to neither stays as it is. All stay as they are if
    torch's summation order differs from ours.
    """
    for module in model.modules():
        if (norm := find_norm(module)) is not None:
            module.forward = norm.forward  # type: ignore[method-assign]


def find_norm(module: nn.Module) -> "TokenNorm | None":
    """How our kernel computes what a module does, bit by bit; None if it does not."""
    epsilon = _epsilon(module)
    if epsilon is None or not _sums_like_torch(module.weight.shape[0]):
        return None
    candidates = (TokenNorm(module, rounds_first, epsilon, module.forward) for rounds_first in (True, False))
    return next((norm for norm in candidates if _are_bit_identical(module, norm.forward)), None)


@dataclass(eq=False)
class TokenNorm:
    """The forward pass of one norm; a method, so that a copied model has copies of its own."""

    module: nn.Module
    rounds_first: bool
    epsilon: float
    otherwise: Forward

    def forward(self, hidden_states: torch.Tensor, *rest: Any) -> torch.Tensor:
        """What the norm computes; anything but a few tokens in memory by torch."""
        x, weight_D = hidden_states, self.module.weight
        # compilers and exporters record torch's own operations
        if rest or torch.compiler.is_compiling() or not (is_in_memory(x) and is_in_memory(weight_D)):
            return self.otherwise(x, *rest)
        width = weight_D.shape[0]
        learns = torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad)
        fits = x.dtype == weight_D.dtype == torch.bfloat16 and x.numel() <= MOST_ELEMENTS and x.is_contiguous()
        if _rms_norm() is None or learns or not fits or x.shape[-1] != width:
            return self.otherwise(x)
        return self.normed(x)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """What our kernel computes of any number of rows, bfloat16 and contiguous."""
        out, weight_D = torch.empty_like(x), self.module.weight
        addresses = (x.data_ptr(), weight_D.data_ptr(), self.epsilon, out.data_ptr())
        _rms_norm()(self.rounds_first, *addresses, x.numel() // len(weight_D), len(weight_D))
        return out

    def passed_back(self, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        """The gradient of the inputs from that of the outputs; both bfloat16 and contiguous."""
        out, weight_D = torch.empty_like(x), self.module.weight
        addresses = (x.data_ptr(), weight_D.data_ptr(), self.epsilon, grad.data_ptr(), out.data_ptr())
        _rms_norm_back()(*addresses, x.numel() // len(weight_D), len(weight_D))
        return out


def _epsilon(module: nn.Module) -> float | None:
    """A norm's epsilon; None if the module is something else."""
    if list(module.children()) or [name for name, _ in module.named_parameters()] != ["weight"]:
        return None
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or weight.dtype != torch.bfloat16 or not len(weight):
        return None
    found = next((getattr(module, name) for name in EPSILONS if hasattr(module, name)), None)
    return found if isinstance(found, float) and weight.device.type == "cpu" and weight.is_contiguous() else None


def _are_bit_identical(module: nn.Module, norm: Forward) -> bool:
    generator, width = torch.Generator().manual_seed(0), module.weight.shape[0]
    with torch.no_grad():
        for power in TRIED_POWERS:
            x_13D = (torch.randn(1, 3, width, generator=generator) * 10.0**power).bfloat16()
            try:
                expected = module(x_13D)
            except Exception:
                return False
            if not isinstance(expected, torch.Tensor) or not torch.equal(norm(x_13D), expected):
                return False
    return True


@functools.cache
def _sums_like_torch(width: int) -> bool:
    """Whether float32 sums of our C are torch's; a norm in bfloat16 would show a difference too rarely."""
    if (add := _sum()) is None:
        return False
    value_TD = torch.randn(TRIED_SUMS, width, generator=torch.Generator().manual_seed(0)).square()
    found = [add(row_D.data_ptr(), width) for row_D in value_TD]
    return torch.equal(value_TD.sum(-1), torch.tensor(found))


@functools.cache
def _sum() -> Any:
    """`expertier_sum`; None without a C compiler, as both below."""
    return c_function("expertier_sum", POINTER, NUMBER, result=ctypes.c_float)


@functools.cache
def _rms_norm() -> Any:
    types = (ctypes.c_int, POINTER, POINTER, ctypes.c_float, POINTER, NUMBER, NUMBER)
    return c_function("expertier_rms_norm", *types)


@functools.cache
def _rms_norm_back() -> Any:
    types = (POINTER, POINTER, ctypes.c_float, POINTER, POINTER, NUMBER, NUMBER)
    return c_function("expertier_rms_norm_back", *types)
