"""Experts computed from their inputs to their outputs by one call of C, from the bytes in their slots.

The products are in an order of summation that `Matvecs` allows, the gate is tables. Strips of a stored matrix are
expanded once for all rows of an expert, so a prompt takes this way too, unless torch's order for as many rows is not
known in `exact`.

Shapes: T tokens, K experts of the token, N = T * K routed rows sorted by expert, D model width, F expert width.
"""

import ctypes
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..checkpoint.experts import weight_names
from ..formats.form import Form
from ..native.kernel_matrix import KernelMatrix
from .gating import Gating, find_gating
from .matvec import Matvecs
from .orders import ExpertWeights, GatingTables, Matrices, Order, addresses, experts_function, part_addresses, pointers
from .routed_rows import VECTOR_ELEMENTS, ExpertSpans

KernelMatrices = Mapping[str, tuple[KernelMatrix, ...]]
"""An expert as our C reads it: the pieces of each parameter."""
Orders = tuple[Order, ...]
"""Of the first and of the second product."""


class FusedExperts:
    """The kernel of one layer's experts.

    Args:
        orders: of the first and of the second product, for one row.
        module: the experts module.
        gating: its gate.
        width: F, columns of the second product.
        matvecs: chooses the orders for several rows.
    """

    def __init__(self, orders: Sequence[Order], module: Any, gating: Gating, width: int, matvecs: Matvecs) -> None:
        self.one_row, self._several_rows = tuple(orders), dict[int, Orders | None]()
        self._free: dict[int, Order | None] = {}
        self._gating, self._width, self._matvecs = gating, width, matvecs
        tables = (gating.gate.data_ptr(), None if gating.linear is None else gating.linear.data_ptr())
        self.tables = GatingTables(*tables, gating.is_gated, gating.is_interleaved)
        self.up_name, self.down_name = weight_names(module)
        names = (f"{name}_bias" if module.has_bias else None for name in (self.up_name, self.down_name))
        self._module, (self.up_bias, self.down_bias) = module, names

    def can_compute(self, rows: Iterable[int], room: Mapping[str, torch.Tensor] | None) -> bool:
        """Whether experts with so many rows each are computed as promised, and are not better left to torch.

        Args:
            rows: of each expert of a call.
            room: room for an expanded expert, which a trial may write to; None if the stored matrices are the model's,
                of which torch multiplies several rows as quickly.
        """
        several = {count for count in rows if count > 1}
        if self._matvecs.is_row_alone or not several:
            return True
        if room is None:
            return False
        if self._matvecs.arithmetic != "exact":
            return True
        return all(orders is not None for orders in self.tried_orders(several, room).values())

    def tried_orders(self, rows: Iterable[int], room: Mapping[str, torch.Tensor]) -> dict[int, Orders | None]:
        """The orders for experts with so many rows each, None where torch's is not known; in `exact`.

        Args:
            rows: numbers of rows, which are tried against torch when they first occur.
            room: room for an expanded expert, which a trial may write to.
        """
        counts, known = set(rows), self._several_rows
        rooms = [
            room[name].t() if self._module.is_transposed else room[name] for name in (self.up_name, self.down_name)
        ]
        for count, orders in self._matvecs.rows_orders(rooms, counts - known.keys() - {1}).items():
            known[count] = None if orders is None else tuple(orders)
        return {count: self.one_row if count == 1 else known[count] for count in counts}

    def orders_of(self, rows: int, matrices: KernelMatrices) -> Orders:
        """The orders of summation for an expert with so many rows, which `can_compute` has allowed.

        Args:
            rows: of x.
            matrices: of the expert, or of any other of its layer.
        """
        if rows not in self._free:
            pieces = [piece for name in (self.up_name, self.down_name) for piece in matrices[name]]
            self._free[rows] = self._matvecs.free_order(pieces, rows)
        if (free := self._free[rows]) is not None:
            return free, free
        return self._several_rows.get(rows) or self.one_row

    def __call__(
        self,
        orders: Orders,
        x_TD: torch.Tensor,
        token_N: torch.Tensor,
        rows: Mapping[int, int],
        matrices: Sequence[KernelMatrices],
        out: Sequence[torch.Tensor],
    ) -> None:
        """Compute several experts.

        Args:
            orders: of the two products.
            x_TD: hidden states, bfloat16 and contiguous.
            token_N: which row of x each row of each expert is, one expert after the other; int64.
            rows: how many rows each expert has, in their order.
            matrices: of each expert.
            out: rows `[n, D]` for each expert; written.
        """
        hidden_NF = x_TD.new_empty(token_N.numel(), self._width)
        starts = [0]
        for count in rows.values():
            starts.append(starts[-1] + count)
        weights = self.weights(list(rows), matrices, x_TD.shape[1])
        up, down = orders
        experts_function()(
            *(up.number, up.block, down.block, weights, self.tables, len(rows)),
            *(x_TD.data_ptr(), token_N.data_ptr(), (ctypes.c_int64 * len(starts))(*starts)),
            *(hidden_NF.data_ptr(), addresses(out)),
        )

    def weights(self, experts: Sequence[int], matrices: Sequence[KernelMatrices], model_width: int) -> ExpertWeights:
        """Matrices and biases of some experts as C takes them."""
        pieces = [matrix[self.up_name] for matrix in matrices]
        firsts, width = [piece[0] for piece in pieces], self._width
        if self._gating.is_interleaved or not self._gating.is_gated:
            gate = linear = matrices_struct(firsts, 0, firsts[0].rows)
        elif len(pieces[0]) == 1:
            gate, linear = matrices_struct(firsts, 0, width), matrices_struct(firsts, width, width)
        else:
            gate, linear = matrices_struct(firsts, 0, width), matrices_struct([piece[1] for piece in pieces], 0, width)
        down = matrices_struct([matrix[self.down_name][0] for matrix in matrices], 0, model_width)
        up_bias, down_bias = self.biases(self.up_bias, experts), self.biases(self.down_bias, experts)
        found = ExpertWeights(gate, linear, down, _address(up_bias), _address(down_bias))
        found.keeps = (gate, linear, down, up_bias, down_bias)  # addresses alone do not keep what they point to
        return found

    @property
    def bias_addresses(self) -> tuple[int, ...]:
        """Where the biases lie; nothing without any."""
        names = (self.up_bias, self.down_bias)
        return tuple(getattr(self._module, name).data_ptr() for name in names if name is not None)

    def biases(self, name: str | None, experts: Sequence[int]) -> Any:
        """Addresses of some experts' biases; None without such a bias."""
        if name is None:
            return None
        bias_EF = getattr(self._module, name)
        return pointers([bias_EF.data_ptr() + expert * bias_EF.stride(0) * bias_EF.itemsize for expert in experts])


def matrices_struct(matrices: Sequence[KernelMatrix], first: int, count: int) -> Matrices:
    """Some rows of matrices of one form and shape, as C takes them."""
    one = matrices[0]
    parts = part_addresses(matrices)
    found = Matrices(one.form, ctypes.addressof(parts), _address(one.parameter), one.rows, one.columns, first, count)
    found.keeps = (parts, one.parameter)
    return found


def _address(array: Any) -> int | None:
    return None if array is None else ctypes.addressof(array)


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
        matrices_of, num_rows = dict(zip(experts, matrices, strict=True)), self.num_rows
        alike: dict[Orders, list[int]] = {}
        for expert in experts:
            orders = self._fused.orders_of(num_rows[expert], matrices_of[expert])
            alike.setdefault(orders, []).append(expert)
        for orders, some in alike.items():
            rows = {expert: num_rows[expert] for expert in some}
            outs = [self._out_ND[slice(*self._spans.of[expert])] for expert in some]
            several = [matrices_of[expert] for expert in some]
            self._fused(orders, self._x_TD, self._spans.tokens_of(some), rows, several, outs)
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


def fuse_experts(module: Any, form: Form, top_k: int, matvecs: Matvecs) -> FusedExperts | None:
    """The kernel of a layer's experts; None if none keeps what `matvecs` promises.

    Args:
        module: the experts module.
        form: how the layer's experts are stored.
        top_k: K; torch's activation runs over the rows of all K experts, and is vectorised to the last element only if
            those divide.
        matvecs: chooses the orders.
    """
    if getattr(module, "has_post_expert_norm", False) or not _has_usual_weights(module, form):
        return None
    up_name, down_name = weight_names(module)
    shape = {parameter.name: parameter.shape for parameter in form.layer.parameters}
    model_width, width = shape[down_name] if not module.is_transposed else shape[down_name][::-1]
    up_rows = (2 if module.has_gate else 1) * width
    if math.prod(shape[up_name]) != up_rows * model_width:
        return None
    if matvecs.arithmetic == "exact" and not _is_vectorised(width, top_k):
        return None
    orders = matvecs.experts_orders([(up_rows, model_width), (model_width, width)])
    if orders is None or width % orders[0].alignment:
        return None
    gating = find_gating(module, width)
    return None if gating is None else FusedExperts(orders, module, gating, width, matvecs)


def _has_usual_weights(module: Any, form: Form) -> bool:
    """Whether our C multiplies both weights from where they are stored, and adds the biases that there are."""
    names, parameters = weight_names(module), form.layer.parameters
    is_known = {parameter.name for parameter in parameters} == set(names) and all(
        parameter.dtype == torch.bfloat16 and len(parameter.shape) == 2 for parameter in parameters
    )
    biases = [getattr(module, f"{name}_bias") for name in names] if module.has_bias else []
    are_usable = all(bias.dtype == torch.bfloat16 and bias.stride(-1) == 1 and bias.dim() == 2 for bias in biases)
    return is_known and are_usable and form.can_multiply(is_transposed=module.is_transposed)


def _is_vectorised(width: int, top_k: int) -> bool:
    """Whether torch's activation of a token's experts has no remainder in any thread's share."""
    return width % VECTOR_ELEMENTS == 0 and top_k * width % (VECTOR_ELEMENTS * torch.get_num_threads()) == 0
