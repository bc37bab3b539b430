"""The experts that a router chose for a token, by one call of C: looked up, computed, weighted and added.

The order in which they are added is torch's, as a trial shows; the products are those of `FusedExperts`.

Shapes: E experts, K experts of the token, D model width.
"""

import ctypes
import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...native.kernel_matrix import PARTS
from ...native.library import NUMBER, POINTER, c_function
from ..fused_experts import FusedExperts, KernelMatrices
from ..orders import ExpertWeights, GatingTables
from .structs import EndingTerms

TRIED_ROWS = 32
"""Sums of experts that are compared with torch's, each as wide as the model."""
WEIGHT_TYPES = (torch.bfloat16, torch.float32)


class RoutedExperts(ctypes.Structure):
    """`struct routed_experts`."""

    _fields_ = (
        *(("order", ctypes.c_int), ("is_rounded", ctypes.c_int)),
        *(("up_block", NUMBER), ("down_block", NUMBER)),
        *(("like", ExpertWeights), ("gating", GatingTables)),
        *((name, NUMBER) for name in ("experts", "chosen", "addresses", "gate_at", "linear_at", "down_at")),
        *(("up_bias", POINTER), ("down_bias", POINTER)),
    )


class ExpertAddresses:
    """Where the matrices of a layer's experts lie, as our C reads them; nothing of experts that are not known here.

    Args:
        num_experts: E; ids are 0..E-1.
    """

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts
        self._address_EM: NDArray[np.uint64] | None = None
        self.first: int | None = None
        """Address of the first row, which stays; None before the first expert is known."""
        self.known: set[int] = set()
        self.example: KernelMatrices | None = None
        """The first expert that was known: all have matrices of one form and shape."""

    def put(self, expert: int, matrices: KernelMatrices) -> None:
        """An expert is there, until it is removed; nothing if our C does not read it."""
        row = [part for pieces in matrices.values() for matrix in pieces for part in matrix.parts]
        if not row:
            return
        if self._address_EM is None:
            self._address_EM, self.example = np.zeros((self._num_experts, len(row)), np.uint64), matrices
            self.first = self._address_EM.ctypes.data
        self._address_EM[expert] = row
        self.known.add(expert)

    def remove(self, expert: int) -> None:
        """An expert is there no longer."""
        if self._address_EM is not None:
            self._address_EM[expert] = 0
        self.known.discard(expert)

    def clear(self) -> None:
        """No expert is there."""
        for expert in list(self.known):
            self.remove(expert)


class TokenExperts:
    """The kernel of one layer's experts for single tokens.

    Args:
        fused: the layer's kernel.
        addresses: of the layer's experts.
        example: one of them.
        num_experts, top_k, model_width: E, K and D of the layer.
        weight_type: of the weights, bfloat16 or float32.
    """

    def __init__(
        self,
        fused: FusedExperts,
        addresses: ExpertAddresses,
        example: KernelMatrices,
        num_experts: int,
        top_k: int,
        model_width: int,
        weight_type: torch.dtype,
    ) -> None:
        self._addresses, self.top_k, self.weight_type = addresses, top_k, weight_type
        up, down = fused.orders_of(1, example)
        like = fused.weights([0], [example], model_width)
        at, place = {}, 0
        for name, pieces in example.items():
            at[name], place = place, place + PARTS * len(pieces)
        gate_at, down_at = at[fused.up_name], at[fused.down_name]
        linear_at = gate_at + PARTS * (len(example[fused.up_name]) - 1)
        self._biases = [fused.biases(name, range(num_experts)) for name in (fused.up_bias, fused.down_bias)]
        self._struct = RoutedExperts(
            *(up.number, weight_type == torch.bfloat16, up.block, down.block, like, fused.tables),
            *(num_experts, top_k, place, gate_at, linear_at, down_at),
            *(None if bias is None else ctypes.addressof(bias) for bias in self._biases),
        )
        self._keeps = like  # addresses alone do not keep what they point to
        self._fused, self._held = fused, fused.bias_addresses
        self._compute = _routed_experts()

    def takes(self, x_1D: torch.Tensor, expert_1K: torch.Tensor, weight_1K: torch.Tensor) -> bool:
        """Whether a token's numbers, ids and weights lie as our C reads them."""
        types = (x_1D.dtype, expert_1K.dtype, weight_1K.dtype)
        is_contiguous = x_1D.is_contiguous() and expert_1K.is_contiguous() and weight_1K.is_contiguous()
        return is_contiguous and types == (torch.bfloat16, torch.int64, self.weight_type)

    def __call__(
        self, x: int, expert: int, weight: int, ending: EndingTerms | None, added_to: int | None, out: int
    ) -> bool:
        """The weighted sum over the token's experts; False, and nothing is done, if one is not known or is there twice.

        Args:
            x: address of D hidden numbers.
            expert, weight: addresses of K ids and weights.
            ending: what becomes of the rounded sum; None if nothing does.
            added_to: address of D bfloat16 numbers that the result is added to; or None.
            out: address of the result, D bfloat16 numbers; written.
        """
        first = self._addresses.first
        if first is None or (self._held and self._fused.bias_addresses != self._held):
            return False
        return bool(self._compute(self._struct, first, x, expert, weight, ending, added_to, out))


@functools.cache
def _routed_experts() -> Any:
    """`expertier_routed_experts`."""
    types = (ctypes.POINTER(RoutedExperts), *([POINTER] * 4), ctypes.POINTER(EndingTerms), POINTER, POINTER)
    return c_function("expertier_routed_experts", *types, result=ctypes.c_int)


@functools.cache
def _combine() -> Any:
    """`expertier_combine`."""
    return c_function("expertier_combine", ctypes.c_int, POINTER, POINTER, NUMBER, NUMBER, POINTER)


@functools.cache
def combines_like_torch(top_k: int, model_width: int, weight_type: torch.dtype, threads: int) -> bool:
    """Whether our C adds K experts of one token in torch's order.

    Half of the terms come a second time, negative, so that sums are rounding errors.

    Args:
        top_k, model_width: K and D, of the terms.
        weight_type: bfloat16 or float32, of the weights.
        threads: in use by torch; large sums are divided among them.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(TRIED_ROWS):
        made_KD = torch.randn(top_k, model_width, generator=generator).bfloat16()
        weight_K = torch.rand(top_k, generator=generator).to(weight_type)
        half = top_k // 2
        made_KD[half : 2 * half], weight_K[half : 2 * half] = -made_KD[:half].flip(0), weight_K[:half].flip(0)
        expected_1D = (made_KD * weight_K.unsqueeze(-1))[None].sum(dim=1).to(made_KD.dtype)
        found_1D = torch.empty_like(expected_1D)
        pointers = (made_KD.data_ptr(), weight_K.data_ptr(), top_k, model_width, found_1D.data_ptr())
        _combine()(weight_type == torch.bfloat16, *pointers)
        if not torch.equal(found_1D, expected_1D):
            return False
    return True
