"""Experts computed from their inputs to their outputs by one call of C, from the bytes in their slots.

The products are in an order of summation that `Matvecs` allows. An activation of bfloat16 numbers is a table of 65,536
results, made by the activation itself. For a single token in `exact`, and for any number of tokens in `fixed`.

Shapes: T tokens, K experts of the token, N = T * K routed rows sorted by expert, D model width, F expert width.
"""

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..checkpoint.experts import ExpertLayer, weight_names
from ..formats.kernel_matrix import KernelMatrix
from .matvec import Matvecs
from .orders import Matrices, Order, addresses, experts_function, pointers
from .routed_rows import VECTOR_ELEMENTS, ExpertSpans

ALL_BFLOAT16 = 1 << 16
"""How many numbers bfloat16 has; a table of their activations takes 128 KiB."""
TRIED_ROWS = 8
"""Rows of random numbers that show whether an activation is a function of single numbers: one that looks at its
neighbours differs from the table in every row."""

KernelMatrices = Mapping[str, tuple[KernelMatrix, ...]]
"""An expert as our C reads it: the pieces of each parameter."""


class FusedExperts:
    """The kernel of one layer's experts, with the table of their activation.

    Args:
        orders: of the first and of the second product.
        module: the experts module.
        table: the activation of every bfloat16 number, in the order of their bits.
        width: F, columns of the second product.
    """

    def __init__(self, orders: Sequence[Order], module: Any, table: torch.Tensor, width: int) -> None:
        self._up_order, self._down_order = orders
        self._table, self._width = table, width
        self._is_gated = bool(module.has_gate)
        self._up_name, self._down_name = weight_names(module)

    def __call__(
        self,
        x_TD: torch.Tensor,
        token_N: torch.Tensor,
        counts: Sequence[int],
        experts: Sequence[KernelMatrices],
        out: Sequence[torch.Tensor],
    ) -> None:
        """Compute several experts.

        Args:
            x_TD: hidden states, bfloat16 and contiguous.
            token_N: which row of x each row of each expert is, one expert after the other; int64.
            counts: rows of each expert.
            experts: each expert's matrices.
            out: rows `[n, D]` for each expert; written.
        """
        hidden_NF = x_TD.new_empty(token_N.numel(), self._width)
        gate, linear = self._up_matrices([expert[self._up_name] for expert in experts])
        down = _matrices([expert[self._down_name][0] for expert in experts], 0, x_TD.shape[1])
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        experts_function()(
            *(self._up_order.number, self._up_order.block, self._down_order.block, gate, linear, down, len(experts)),
            *(x_TD.data_ptr(), token_N.data_ptr(), (ctypes.c_int64 * len(starts))(*starts), self._table.data_ptr()),
            *(hidden_NF.data_ptr(), addresses(out)),
        )

    def _up_matrices(self, pieces_n: Sequence[tuple[KernelMatrix, ...]]) -> tuple[Matrices, Matrices | None]:
        """The rows that are activated, and those that they are multiplied with: of one matrix, or of two."""
        gates = [pieces[0] for pieces in pieces_n]
        gate = _matrices(gates, 0, self._width)
        if not self._is_gated:
            return gate, None
        if len(pieces_n[0]) == 1:
            return gate, _matrices(gates, self._width, self._width)
        return gate, _matrices([pieces[1] for pieces in pieces_n], 0, self._width)


def _matrices(matrices: Sequence[KernelMatrix], first: int, count: int) -> Matrices:
    """Some rows of matrices of one form and shape, as C takes them."""
    one = matrices[0]
    parts = pointers([part for matrix in matrices for part in matrix.parts])
    found = Matrices(one.form, ctypes.addressof(parts), one.parameter, one.rows, one.columns, first, count)
    found.keeps = parts  # the address alone does not keep it
    return found


class FusedRows:
    """What `RoutedRows` is, where the experts are `FusedExperts`.

    Args:
        fused: the layer's kernel.
        num_experts: E; ids outside 0..E-1 are left out.
        x_TD: hidden states, bfloat16 and contiguous.
        expert_TK: expert ids.
        weight_TK: combine weights.
    """

    def __init__(
        self,
        fused: FusedExperts,
        num_experts: int,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
    ) -> None:
        self._fused, self._x_TD, self._weight_TK = fused, x_TD, weight_TK
        self._spans = ExpertSpans(expert_TK, num_experts, is_sorted=False)
        is_whole = sum(self.num_rows.values()) == expert_TK.numel()
        make = x_TD.new_empty if is_whole else x_TD.new_zeros
        self._out_ND = make(expert_TK.numel(), x_TD.shape[1])

    @property
    def num_rows(self) -> dict[int, int]:
        """Rows of each expert that has any."""
        return self._spans.num_rows

    def compute_several(self, experts: Sequence[int], matrices: Sequence[KernelMatrices]) -> bool:
        """All of several experts; always done."""
        spans = [self._spans.of[expert] for expert in experts]
        counts = [stop - start for start, stop in spans]
        outs = [self._out_ND[slice(*span)] for span in spans]
        self._fused(self._x_TD, self._spans.tokens_of(experts), counts, matrices, outs)
        return True

    def compute(self, expert: int, matrices: KernelMatrices) -> None:
        """All of one expert."""
        self.compute_several((expert,), (matrices,))

    start = compute

    def gate(self) -> None:
        """Nothing is left to do: each expert was computed to its end."""

    def finish(self, expert: int, matrices: KernelMatrices) -> None:
        """Nothing is left to do."""

    def combine(self) -> torch.Tensor:
        """The weighted sum over each token's experts, `[T, D]`."""
        return self._spans.combine(self._out_ND, self._weight_TK, self._x_TD.dtype)


def fuse_experts(module: Any, layer: ExpertLayer, is_stored: bool, top_k: int, matvecs: Matvecs) -> FusedExperts | None:
    """The kernel of a layer's experts; None if none keeps what `matvecs` promises.

    Args:
        module: the experts module.
        layer: shapes and dtypes of its weights.
        is_stored: whether our C multiplies the form in which the experts are stored.
        top_k: K; torch's activation runs over the rows of all K experts, and is vectorised to the last element only if
            those divide.
        matvecs: chooses the orders.
    """
    shape = {parameter.name: parameter.shape for parameter in layer.parameters}
    names = weight_names(module)
    is_plain = not (module.has_bias or module.is_transposed or getattr(module, "has_post_expert_norm", False))
    is_bfloat16 = all(parameter.dtype == torch.bfloat16 for parameter in layer.parameters)
    if not (is_stored and is_plain and is_bfloat16 and set(shape) == set(names) and _has_usual_gate(module)):
        return None
    width = shape["down_proj"][1]
    if matvecs.arithmetic == "exact" and not _is_vectorised(width, top_k):
        return None
    orders = matvecs.experts_orders([shape[name] for name in names])
    if orders is None or width % orders[0].alignment:
        return None
    table = _activation_table(module, width)
    return None if table is None else FusedExperts(orders, module, table, width)


def _is_vectorised(width: int, top_k: int) -> bool:
    """Whether torch's activation of a token's experts has no remainder in any thread's share."""
    return width % VECTOR_ELEMENTS == 0 and top_k * width % (VECTOR_ELEMENTS * torch.get_num_threads()) == 0


def _has_usual_gate(module: Any) -> bool:
    """Whether the gate is transformers' own, activation(first half) * second half."""
    return not module.has_gate or type(module)._apply_gate.__module__ == "transformers.integrations.moe"


def _activation_table(module: Any, width: int) -> torch.Tensor | None:
    """The activation of every bfloat16 number; None if it is not a function of single numbers."""
    every = torch.arange(ALL_BFLOAT16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    table = module.act_fn(every)
    if table.shape != every.shape or table.dtype != every.dtype:
        return None
    # whole vectors only: their remainder goes through another routine, whose last bits can differ
    columns = -(-width // VECTOR_ELEMENTS) * VECTOR_ELEMENTS
    tried = torch.randn(TRIED_ROWS, columns, generator=torch.Generator().manual_seed(0)).mul_(4).bfloat16()
    found = table[tried.view(torch.int16).long() & (ALL_BFLOAT16 - 1)]
    return table if torch.equal(found, module.act_fn(tried)) else None
