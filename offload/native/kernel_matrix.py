"""A matrix in memory as our C reads it, whatever its stored form."""

from typing import Any, NamedTuple

import torch

MOST_PLANES = 3
"""Planes of signs that our C adds to codes."""
PLAIN, COMPRESSED, GGUF, BLOCKS, TERNARY = 0, 1, 4, 6, 7
"""Numbers of stored forms in our C; the others are of codes (`codes/expander.py`)."""


class KernelMatrix(NamedTuple):
    """Where a matrix lies and what its bytes mean. It does not hold the memory.

    Each address has a field of its own, because our C takes those of several matrices in a row: with one too few, it
    would read the next matrix's.
    """

    form: int
    """Number of its stored form."""
    rows: int
    columns: int
    parameter: Any
    """What the form makes of the addresses: four int32 as ctypes has them; None if it needs none."""
    codes: int
    """Address of the codes, or of all there is; the others are 0 where the form does not have them."""
    scales: int = 0
    zeros: int = 0
    scale_of_scales: int = 0
    plane_1: int = 0
    plane_2: int = 0
    plane_3: int = 0
    level_8: int = 0
    """Of residual blocks only, whose levels take all fields in their order."""

    @property
    def parts(self) -> tuple[int, ...]:
        """All addresses, as many for each matrix."""
        return self[FIRST_PART:]


FIRST_PART = KernelMatrix._fields.index("codes")
PARTS = len(KernelMatrix._fields) - FIRST_PART
"""Addresses of a matrix, and levels of residual blocks that our C adds."""


def plain_matrix(weight_FD: torch.Tensor) -> KernelMatrix:
    """A bfloat16 matrix as it is, contiguous."""
    return KernelMatrix(PLAIN, weight_FD.shape[0], weight_FD.shape[1], None, weight_FD.data_ptr())
