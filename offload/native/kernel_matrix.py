"""A matrix in memory as our C reads it, whatever its stored form."""

from typing import Any, NamedTuple

import torch

MOST_PLANES = 3
"""Planes of signs that our C adds to codes."""
PARTS = 4 + MOST_PLANES
"""Pointers of a matrix: its codes, scales, zeros, scale of scales, and planes, as far as its form has them."""
PLAIN, COMPRESSED, GGUF = 0, 1, 4
"""Numbers of stored forms in our C; those between are of codes (`codes/expander.py`)."""


class KernelMatrix(NamedTuple):
    """Where a matrix lies and what its bytes mean. It does not hold the memory."""

    form: int
    """Number of its stored form."""
    rows: int
    columns: int
    parts: tuple[int, ...]
    """Address of each part; 0 for those that the form does not have."""
    parameter: Any = None
    """What the form makes of them: four int32 as ctypes has them; None if it needs none."""


def part_addresses(*addresses: int) -> tuple[int, ...]:
    """The parts that a form has, and 0 for all others."""
    return (*addresses, *[0] * (PARTS - len(addresses)))


def plain_matrix(weight_FD: torch.Tensor) -> KernelMatrix:
    """A bfloat16 matrix as it is, contiguous."""
    return KernelMatrix(PLAIN, weight_FD.shape[0], weight_FD.shape[1], part_addresses(weight_FD.data_ptr()))
