"""Rotary positions of single tokens: one call of C for queries and keys, bit-identical to torch's thirteen operations.

Shapes: H heads of queries, J heads of keys, W head width, A angles. Of each head R columns are rotated, the first ones:
A = R, or R/2 where both halves share angles.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..native.library import NUMBER, POINTER, c_function
from .matvec import is_in_memory

Pair = tuple[torch.Tensor, torch.Tensor]
TRIED_ROWS = 64
"""Heads of random numbers that show which halves a function rotates and where it rounds: every output takes part in
each, and another order of operations changes about one in three."""


class TokenRotary:
    """`apply_rotary_pos_emb` of one family: by our kernel where it gives the same bits.

    Args:
        otherwise: the family's own function, of queries, keys, cosines and sines.
    """

    def __init__(self, otherwise: Callable[..., Any]) -> None:
        self._otherwise = otherwise
        self._tried: dict[tuple[int, int], int | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Rotated queries and keys; anything but single tokens in memory by the family's function."""
        if kwargs or len(args) != 4 or not _fits(*args):
            return self._otherwise(*args, **kwargs)
        widths = (args[0].shape[-1], args[2].shape[-1])
        if widths not in self._tried:
            candidates = rotated_columns(*widths)
            self._tried[widths] = next((each for each in candidates if self._equals(*widths, each)), None)
        rotated = self._tried[widths]
        return self._otherwise(*args) if rotated is None else _rotate(*args, rotated)

    def _equals(self, width: int, angles: int, rotated: int) -> bool:
        """Whether our kernel is bit-identical to the family's function."""
        if _kernel() is None:
            return False
        generator = torch.Generator().manual_seed(0)
        q, k, cos, sin = (
            torch.randn(*shape, generator=generator).bfloat16()
            for shape in ((1, TRIED_ROWS, 1, width), (1, 2, 1, width), (1, 1, angles), (1, 1, angles))
        )
        try:
            expected_q, expected_k = self._otherwise(q, k, cos, sin)
            found_q, found_k = _rotate(q, k, cos, sin, rotated)
            return torch.equal(found_q, expected_q) and torch.equal(found_k, expected_k)
        except Exception:  # of a function that is something else
            return False


def rotated_columns(width: int, angles: int) -> list[int]:
    """How many columns of a head may be rotated by so many angles: twice as many, or as many."""
    return [rotated for rotated in (2 * angles, angles) if rotated <= width and rotated % 2 == 0]


def _fits(q_1H1W: Any, k_1J1W: Any, cos_11A: Any, sin_11A: Any) -> bool:
    tensors = (q_1H1W, k_1J1W, cos_11A, sin_11A)
    if not all(map(is_in_memory, tensors)) or (torch.is_grad_enabled() and any(each.requires_grad for each in tensors)):
        return False
    q, k, cos = q_1H1W.shape, k_1J1W.shape, cos_11A.shape
    return (
        len(q) == len(k) == 4
        and len(cos) == 3
        and q[0] == q[2] == k[0] == k[2] == cos[0] == cos[1] == 1
        and q[3] == k[3]
        and cos == sin_11A.shape
        and all(each.dtype == torch.bfloat16 and each.is_contiguous() for each in tensors)
    )


def _rotate(
    q_1H1W: torch.Tensor, k_1J1W: torch.Tensor, cos_11A: torch.Tensor, sin_11A: torch.Tensor, rotated: int
) -> Pair:
    kernel = _kernel()
    assert kernel is not None
    rotated_q, rotated_k = torch.empty_like(q_1H1W), torch.empty_like(k_1J1W)
    angles = (cos_11A.data_ptr(), sin_11A.data_ptr(), cos_11A.shape[-1])
    columns = (q_1H1W.shape[3], rotated)
    kernel(q_1H1W.data_ptr(), rotated_q.data_ptr(), q_1H1W.shape[1], *columns, *angles)
    kernel(k_1J1W.data_ptr(), rotated_k.data_ptr(), k_1J1W.shape[1], *columns, *angles)
    return rotated_q, rotated_k


@functools.cache
def _kernel() -> Any:
    """`expertier_rotate`; None without a C compiler."""
    return c_function("expertier_rotate", POINTER, POINTER, NUMBER, NUMBER, NUMBER, POINTER, POINTER, NUMBER)
