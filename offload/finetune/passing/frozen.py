"""Experts with frozen bfloat16 matrices, computed by our C in both directions.

Products read a matrix as it lies in its slot. oneDNN would first bring it into an order of its own, for every product
anew, and compile a kernel for every new number of rows. Adapters keep their float32 factors. Sums do not depend on
threads, nor on the rows beside.

Shapes: n rows of one expert, I inputs, O outputs of a matrix, D model width, F expert width, r rank of an adapter.
"""

import ctypes
import functools
from typing import Any

import torch

from ...checkpoint.experts import ExpertLayer, weight_names
from ...compute.gating import Gating, Slopes, find_gating, find_slopes
from ...compute.orders import Order
from ...native.library import NUMBER, POINTER, c_function
from .low_rank import MOST_RANK, add, inner, pass_back, product, summing_order
from .rows import Seen


class GateTables(ctypes.Structure):
    """`struct gate_tables` of native/tuning/gates.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate", "gate_slope", "linear", "linear_slope")),
        *((name, ctypes.c_int) for name in ("is_gated", "is_interleaved")),
    )


GATE_TYPES = (ctypes.POINTER(GateTables), POINTER, NUMBER, NUMBER, POINTER, POINTER)
"""Of the arguments that both functions of gates.c take first."""


def frozen_experts(module: Any, layer: ExpertLayer) -> "FrozenExperts | None":
    """The kernel of a layer's experts; None where our C does not compute them, or torch does as quickly.

    Args:
        module: the experts module.
        layer: its parameters.
    """
    names, parameters = weight_names(module), {parameter.name: parameter for parameter in layer.parameters}
    is_usual = parameters.keys() == set(names) and not getattr(module, "has_post_expert_norm", False)
    if not is_usual or any(parameter.dtype != torch.bfloat16 for parameter in parameters.values()):
        return None
    order, shapes = summing_order(), [(value.shape[0], value.shape[1]) for value in parameters.values()]
    if order is None or not all(order.fits(shape) for shape in shapes):
        return None
    width = parameters["down_proj"].shape[0 if module.is_transposed else 1]
    gating = find_gating(module, width)
    return None if gating is None else FrozenExperts(order, module, gating, find_slopes(module, gating), width)


class FrozenExperts:
    """The kernel of one layer's experts.

    Args:
        order: of the products' sums; it fits all matrices.
        module: the experts module.
        gating, slopes: its gate.
        width: F, a multiple of what the order's tiles have.
    """

    def __init__(self, order: Order, module: Any, gating: Gating, slopes: Slopes, width: int) -> None:
        self._order, self._module, self._width = order, module, width
        self._up, self._down = weight_names(module)
        tables = (gating.gate, slopes.gate, gating.linear, slopes.linear)
        self._kept = [None if table is None else table.float().contiguous() for table in tables]
        self._tables = GateTables(*map(_address, self._kept), gating.is_gated, gating.is_interleaved)

    def takes(self, seen: Seen) -> bool:
        """Whether an expert's adapters have factors as our C reads them."""
        return all(low.a_rI.dtype == torch.float32 and len(low.a_rI) <= MOST_RANK for low in seen.adapters.values())

    def outputs(self, expert: int, seen: Seen, x_nD: torch.Tensor) -> torch.Tensor:
        """One expert's outputs for its own rows, `[n, D]`, before they are weighted; `x` is contiguous."""
        up_nO, _ = self._linear(expert, seen, x_nD, self._up)
        return self._linear(expert, seen, self._hidden(up_nO, None), self._down)[0]

    def pass_back(
        self, expert: int, seen: Seen, x_nD: torch.Tensor, weight_n: torch.Tensor, grad_nD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of an expert's rows and of their weights; adapters get theirs.

        The last product is left out: a row's output is linear in what goes into it, so that is weighted instead.

        Args:
            expert, seen: the expert.
            x_nD: rows that go in.
            weight_n: float32.
            grad_nD: of the weighted outputs, bfloat16.
        """
        up_nO, inner_nr = self._linear(expert, seen, x_nD, self._up)
        grad_nF = self._product(grad_nD, self._matrix(seen, self._down))
        if (low := seen.adapters.get(self._down)) is not None:
            weighted_nF = self._hidden(up_nO, weight_n)
            pass_back(low, weighted_nF, inner(weighted_nF, low.a_rI), grad_nD, grad_nF)
        grad_n = torch.empty(len(x_nD))
        _gate_back()(
            *(self._tables, up_nO.data_ptr(), len(x_nD), self._width),
            *(weight_n.data_ptr(), grad_nF.data_ptr(), grad_n.data_ptr()),
        )
        if self._module.has_bias:
            grad_n += (grad_nD @ self._module.down_proj_bias[expert].to(grad_nD.dtype)).float()
        grad_x_nD = self._product(up_nO, self._matrix(seen, self._up))
        if (low := seen.adapters.get(self._up)) is not None:
            assert inner_nr is not None
            pass_back(low, x_nD, inner_nr, up_nO, grad_x_nD)
        return grad_x_nD, grad_n

    def _hidden(self, up_nO: torch.Tensor, weight_n: torch.Tensor | None) -> torch.Tensor:
        """What goes into the last product, weighted if weights are given."""
        hidden_nF = up_nO.new_empty(len(up_nO), self._width)
        _gate()(*(self._tables, up_nO.data_ptr(), len(up_nO), self._width), _address(weight_n), hidden_nF.data_ptr())
        return hidden_nF

    def _matrix(self, seen: Seen, name: str) -> torch.Tensor:
        """A matrix as `[O, I]`, however it lies."""
        weight = seen.weights[name]
        return weight.t() if self._module.is_transposed else weight

    def _linear(
        self, expert: int, seen: Seen, x_nI: torch.Tensor, name: str
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """A product with its bias and adapter, and what the adapter's first factor gives."""
        out_nO = self._product(x_nI, self._matrix(seen, name).t())
        if self._module.has_bias:
            out_nO += getattr(self._module, f"{name}_bias")[expert]
        if (low := seen.adapters.get(name)) is None:
            return out_nO, None
        inner_nr = inner(x_nI, low.a_rI)
        add(out_nO, inner_nr, low.b_Or.detach().t().contiguous(), low.scale)
        return out_nO, inner_nr

    def _product(self, x_nI: torch.Tensor, matrix_IO: torch.Tensor) -> torch.Tensor:
        """`x @ matrix`, whichever of the matrix's dimensions lies in rows."""
        return product(self._order, x_nI, matrix_IO)


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@functools.cache
def _gate() -> Any:
    return c_function("expertier_gate", *GATE_TYPES)


@functools.cache
def _gate_back() -> Any:
    return c_function("expertier_gate_back", *GATE_TYPES, POINTER)
