"""Random directions of signs, drawn from seeds, and steps of weights along them.

In bfloat16 our C does both, bit-identical to torch's operations one after the other.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...native.library import library

PIECE = 1 << 18
"""Numbers at a time: 1 MiB in float32, which stays in a core's cache from one operation to the next. Not tuned."""


class Direction:
    """One random direction of one step for some tensors, drawn once, one tensor after the other.

    Args:
        seed: the run's, 0 or more.
        step: counts from 1.
        owner: a MoE layer, from 1, and an expert; or RESIDENT and the number of a parameter.
    """

    def __init__(self, seed: int, step: int, owner: tuple[int, int]) -> None:
        self._generator = np.random.SFC64(np.random.SeedSequence([seed, step, *owner]))

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Signs, 1 or -1 in int8, of the shape of a tensor."""
        count, kernels = tensor.numel(), _kernels()
        bits = self._raw(-(-count // 64)).view(np.uint8)
        if kernels is None:
            return torch.from_numpy(np.unpackbits(bits, count=count).view(np.int8)).mul_(2).sub_(1).view(tensor.shape)
        found = torch.empty(tensor.shape, dtype=torch.int8)
        kernels.expertier_signs(bits.ctypes.data, count, found.data_ptr())
        return found

    def chances(self, count: int) -> torch.Tensor:
        """Numbers of 16 bits with a sign, each as likely."""
        return torch.from_numpy(self._raw(-(-count // 4)).view(np.int16)[:count])

    def _raw(self, count: int) -> np.ndarray:
        found: np.ndarray = self._generator.random_raw(count)
        return found


def perturbed(weight: torch.Tensor, direction: torch.Tensor, epsilon: float) -> torch.Tensor:
    """A weight at a distance along a direction, in its own dtype."""
    found = torch.empty(weight.shape, dtype=weight.dtype)
    if (kernels := _kernels_for(weight)) is not None:
        given = (weight.data_ptr(), direction.data_ptr(), epsilon, weight.numel(), found.data_ptr())
        kernels.expertier_perturb(*given)
        return found
    pieces = zip(*(tensor.reshape(-1).split(PIECE) for tensor in (found, weight, direction)), strict=True)
    for to, of, along in pieces:
        to.copy_(of.float().add_(along, alpha=epsilon))
    return found


def moved(weights: Sequence[torch.Tensor], by: Direction, size: float) -> list[torch.Tensor]:
    """Weights after a step of some size against its direction; all of an owner together, in their order.

    In bfloat16 they are rounded up or down by chance, which is drawn after the directions. A step changes far less
    than a bfloat16's last bit, and would be lost if it were rounded to the nearest. By chance it arrives on average.
    """
    directions = [by.of(weight) for weight in weights]
    if weights[0].dtype != torch.bfloat16:
        return [perturbed(weight, along, -size) for weight, along in zip(weights, directions, strict=True)]
    found = [torch.empty(weight.shape, dtype=weight.dtype) for weight in weights]
    for new, weight, direction in zip(found, weights, directions, strict=True):
        chance = by.chances(weight.numel())
        if (kernels := _kernels_for(weight)) is not None:
            given = (weight.data_ptr(), direction.data_ptr(), chance.data_ptr(), -size, weight.numel(), new.data_ptr())
            kernels.expertier_move(*given)
            continue
        pieces = zip(*(tensor.reshape(-1).split(PIECE) for tensor in (new, weight, direction, chance)), strict=True)
        for to, of, along, odds in pieces:
            bits = of.float().add_(along, alpha=-size).view(torch.int32)
            # 0..65535 is added to what bfloat16 cuts off
            bits.add_(odds).add_(1 << 15).bitwise_and_(-(1 << 16))
            to.copy_(bits.view(torch.float32))
    return found


def _kernels_for(weight: torch.Tensor) -> Any:
    """The library where it takes a weight as it is, else None."""
    is_taken = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()
    return _kernels() if is_taken else None


@functools.cache
def _kernels() -> Any:
    """The library with the types of native/tuning/directions.c set; None without a C compiler."""
    try:
        found = library()
    except OSError:
        return None
    pointer, number, size = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    found.expertier_signs.argtypes = [pointer, number, pointer]
    found.expertier_perturb.argtypes = [pointer, pointer, size, number, pointer]
    found.expertier_move.argtypes = [pointer, pointer, pointer, size, number, pointer]
    for function in (found.expertier_signs, found.expertier_perturb, found.expertier_move):
        function.restype = None
    return found
