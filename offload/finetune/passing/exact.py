"""Experts of several passes in one call of our C, bit-identical to torch's products.

torch brings a matrix into an order of its own for every product anew. Ours read it as it lies, once for all passes
that see it. Each number of rows is tried against torch's product when it first occurs; those that differ are torch's.

Shapes: n rows of one expert in one pass, N routed rows of one call, D model width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...checkpoint.experts import ExpertLayer
from ...compute.fused_experts import FusedExperts, Orders, fuse_experts
from ...compute.matvec import Matvecs
from ...formats.form import Form
from ...native.kernel_matrix import KernelMatrix, plain_matrix
from .rows import Seen, Weights

Side = tuple[int, ...]
"""Where the matrices lie that some passes see."""


class ExactExperts:
    """The kernel of one layer's experts.

    Args:
        fused: computes them, in `exact`.
        layer: its parameters.
    """

    def __init__(self, fused: FusedExperts, layer: ExpertLayer) -> None:
        self._fused, self._layer = fused, layer
        self._orders: dict[int, Orders | None] = {}

    def expect(self, rows: set[int]) -> None:
        """Try numbers of rows that did not occur before."""
        if unknown := rows - self._orders.keys():
            room = {each.name: torch.empty(each.shape, dtype=each.dtype) for each in self._layer.parameters}
            self._orders |= self._fused.tried_orders(unknown, room)

    def outputs(self, seen: Sequence[Seen], x: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """One expert's outputs for its rows in several passes, `[n, D]` each; None where torch has to compute them.

        Args:
            seen: the expert, as each pass sees it.
            x: each pass's rows, of whose number `expect` was told.
        """
        if any(x_nD.dtype != torch.bfloat16 for x_nD in x):
            return [None] * len(x)
        alike: dict[Orders, dict[Side, list[int]]] = {}
        for number, (of_pass, x_nD) in enumerate(zip(seen, x, strict=True)):
            if (orders := self._orders[len(x_nD)]) is not None:
                side = tuple(weight.data_ptr() for weight in of_pass.weights.values())
                alike.setdefault(orders, {}).setdefault(side, []).append(number)
        found: list[torch.Tensor | None] = [None] * len(x)
        for orders, sides in alike.items():
            numbers = [number for some in sides.values() for number in some]
            x_ND = torch.cat([x[number] for number in numbers])
            rows = {place: sum(len(x[number]) for number in some) for place, some in enumerate(sides.values())}
            matrices = [_matrices(seen[some[0]].weights) for some in sides.values()]
            out_ND = torch.empty_like(x_ND)
            outs = out_ND.split(list(rows.values()))
            self._fused(orders, x_ND, torch.arange(len(x_ND)), rows, matrices, outs)
            for number, out_nD in zip(numbers, out_ND.split([len(x[number]) for number in numbers]), strict=True):
                found[number] = out_nD
        return found


def exact_experts(module: Any, form: Form, top_k: int, matvecs: Matvecs) -> ExactExperts | None:
    """The kernel of a layer's experts; None where torch has to compute them, or their biases differ by pass.

    Args:
        module: the experts module.
        form: how its experts are stored.
        top_k: K; not every K leaves an activation without a remainder.
        matvecs: finds torch's orders of summation, in `exact`.
    """
    fused = None if module.has_bias else fuse_experts(module, form, top_k, matvecs)
    return None if fused is None else ExactExperts(fused, form.layer)


def _matrices(weights: Weights) -> Mapping[str, tuple[KernelMatrix, ...]]:
    return {name: (plain_matrix(weight),) for name, weight in weights.items()}
