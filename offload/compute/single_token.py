"""The experts of a single token, each computed from its input to its output by one call of C.

Results are bit-identical to those of `RoutedRows`. The products are the kernels that were tried against torch. An
activation of bfloat16 numbers is a table of 65,536 results, made by the activation itself.

Shapes: K experts of the token, D model width, F expert width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..checkpoint.experts import weight_names
from ..formats.form import Form
from .matvec import ExpertsKernel, Matvecs, pointers
from .routed_rows import VECTOR_ELEMENTS

ALL_BFLOAT16 = 1 << 16
"""How many numbers bfloat16 has; a table of their activations takes 128 KiB."""
TRIED_ROWS = 8
"""Rows of random numbers that show whether an activation is a function of single numbers: one that looks at its
neighbours differs from the table in every row."""


class FusedExperts:
    """The kernel of one layer's experts, with the table of their activation.

    Args:
        kernel: of `Matvecs.experts_kernel`.
        module: the experts module.
        table: the activation of every bfloat16 number, in the order of their bits.
        width: F, a multiple of VECTOR_ELEMENTS.
        form_kernel: number by which the C code knows the weights' stored form.
    """

    def __init__(
        self, kernel: ExpertsKernel, module: Any, table: torch.Tensor, width: int, *, form_kernel: int
    ) -> None:
        self._kernel, self._table, self._width, self._form_kernel = kernel, table, width, form_kernel
        self._is_gated = bool(module.has_gate)
        self._up_name, self._down_name = weight_names(module)

    def __call__(self, x_1D: torch.Tensor, weights: Sequence[Mapping[str, torch.Tensor]], out: Any) -> None:
        """Compute experts of one token.

        Args:
            x_1D: hidden state, bfloat16 and contiguous.
            weights: matrices of each expert by name, as its slot stores them.
            out: a row `[D]` for each expert; written.
        """
        hidden_KF = x_1D.new_empty(len(weights), self._width)
        self._kernel(
            self._form_kernel,
            len(weights),
            pointers([weight[self._up_name] for weight in weights]),
            pointers([weight[self._down_name] for weight in weights]),
            x_1D.data_ptr(),
            self._table.data_ptr(),
            self._is_gated,
            hidden_KF.data_ptr(),
            pointers(out),
            self._width,
            x_1D.shape[-1],
        )


class TokenRows:
    """What `RoutedRows` is for many tokens, for one, whose experts are all different.

    Args:
        fused: the layer's kernel.
        experts: the token's experts; ids >= E are left out.
        num_experts: E; smaller ids are computed.
        x_1D: hidden state, bfloat16 and contiguous.
        weight_1K: combine weights.
    """

    def __init__(
        self, fused: FusedExperts, experts: Sequence[int], num_experts: int, x_1D: torch.Tensor, weight_1K: torch.Tensor
    ) -> None:
        self._fused, self._x_1D, self._weight_1K = fused, x_1D, weight_1K
        self._place = {expert: place for place, expert in enumerate(experts) if 0 <= expert < num_experts}
        make = x_1D.new_empty if len(self._place) == len(experts) else x_1D.new_zeros
        self._out_KD = make(len(experts), x_1D.shape[1])

    @property
    def num_rows(self) -> dict[int, int]:
        """Rows of each expert."""
        return dict.fromkeys(self._place, 1)

    def compute_singles(self, experts: Sequence[int], weights: Sequence[Mapping[str, torch.Tensor]]) -> bool:
        """All of several experts."""
        self._fused(self._x_1D, weights, [self._out_KD[self._place[expert]] for expert in experts])
        return True

    def compute(self, expert: int, weights: Mapping[str, torch.Tensor]) -> None:
        """All of one expert."""
        self._fused(self._x_1D, (weights,), (self._out_KD[self._place[expert]],))

    start = compute

    def gate(self) -> None:
        """Nothing is left to do: each expert was computed to its end."""

    def finish(self, expert: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Nothing is left to do."""

    def combine(self) -> torch.Tensor:
        """The weighted sum over the token's experts, `[1, D]`."""
        weighted_KD = self._out_KD * self._weight_1K.view(-1, 1)
        return weighted_KD[None].sum(dim=1).to(self._x_1D.dtype)


def fuse_experts(module: Any, form: Form, top_k: int, matvecs: Matvecs) -> FusedExperts | None:
    """The kernel of a layer's experts; None if none is bit-identical to torch.

    Args:
        module: the experts module.
        form: how the layer's experts are stored.
        top_k: K; torch's activation runs over the rows of all K experts, and is vectorised to the last element only if
            those divide.
    """
    layer, form_kernel = form.layer, form.kernel
    shape = {parameter.name: parameter.shape for parameter in layer.parameters}
    names = weight_names(module)
    is_plain = not (module.has_bias or module.is_transposed or getattr(module, "has_post_expert_norm", False))
    is_bfloat16 = all(parameter.dtype == torch.bfloat16 for parameter in layer.parameters)
    if (
        form_kernel is None
        or not is_plain
        or not is_bfloat16
        or set(shape) != set(names)
        or not _has_usual_gate(module)
    ):
        return None
    width = shape["down_proj"][1]
    if width % VECTOR_ELEMENTS or top_k * width % (VECTOR_ELEMENTS * torch.get_num_threads()):
        return None
    kernel = matvecs.experts_kernel([shape[name] for name in names])
    table = None if kernel is None else _activation_table(module, width)
    if kernel is None or table is None:
        return None
    return FusedExperts(kernel, module, table, width, form_kernel=form_kernel)


def _has_usual_gate(module: Any) -> bool:
    """Whether the gate is transformers' own, activation(first half) * second half."""
    return not module.has_gate or type(module)._apply_gate.__module__ == "transformers.integrations.moe"


def _activation_table(module: Any, width: int) -> torch.Tensor | None:
    """The activation of every bfloat16 number; None if it is not a function of single numbers."""
    every = torch.arange(ALL_BFLOAT16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    table = module.act_fn(every)
    if table.shape != every.shape or table.dtype != every.dtype:
        return None
    tried = torch.randn(TRIED_ROWS, width, generator=torch.Generator().manual_seed(0)).mul_(4).bfloat16()
    found = table[tried.view(torch.int16).long() & (ALL_BFLOAT16 - 1)]
    return table if torch.equal(found, module.act_fn(tried)) else None
