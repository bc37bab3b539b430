"""What one expert computes, in the arithmetic of the implementation that transformers itself would use.

On the CPU that is `grouped_mm`, which needs rows of a multiple of 16 bytes; models with other shapes run in
transformers only with `experts_implementation="eager"`, so for those the model's own loop over experts is run here too.

Shapes: T tokens, K experts per token, N = T * K routed rows sorted by expert, n the rows of one expert, D model width,
F expert width.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .layout import ExpertLayer

GROUPED_ALIGNMENT_BYTES = 16


class RoutedRows:
    """The rows of one call, sorted by expert, and the result they are added up to.

    The matrix products have the same shapes, and the sums the same order, as in
    `transformers.integrations.moe.grouped_mm_experts_forward`, whatever the order in which the experts are computed.

    Args:
        module: the experts module, for its layout flags, biases, gate and norm.
        x_TD: hidden states.
        expert_TK: expert ids; ids >= E are left out (they contribute nothing).
        weight_TK: combine weights.
    """

    def __init__(
        self, module: Any, num_experts: int, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> None:
        self._module = module
        self._x_TD, self._weight_TK = x_TD, weight_TK
        self.num_tokens, self.top_k = expert_TK.shape
        expert_N, self._order_N = torch.sort(expert_TK.reshape(-1))
        self._x_ND = x_TD[self._order_N // self.top_k]
        self.span: dict[int, tuple[int, int]] = _spans(expert_N.tolist(), num_experts)
        self._out_ND: torch.Tensor | None = None

    @property
    def num_rows(self) -> dict[int, int]:
        """Rows of each expert that has any."""
        return {expert: stop - start for expert, (start, stop) in self.span.items()}

    def compute(self, expert: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Run one expert on its rows."""
        module, (start, stop) = self._module, self.span[expert]
        up_name = "gate_up_proj" if module.has_gate else "up_proj"
        hidden_nF = self._linear(self._x_ND[start:stop], weights[up_name])
        if module.has_bias:
            hidden_nF.add_(getattr(module, f"{up_name}_bias")[expert])
        hidden_nF = module._apply_gate(hidden_nF) if module.has_gate else module.act_fn(hidden_nF)
        out_nD = self._linear(hidden_nF, weights["down_proj"])
        if module.has_bias:
            out_nD.add_(module.down_proj_bias[expert])
        if self._out_ND is None:
            self._out_ND = out_nD.new_zeros(self._order_N.numel(), out_nD.shape[-1])
        self._out_ND[start:stop] = out_nD

    def combine(self) -> torch.Tensor:
        """The weighted sum over each token's experts, `[T, D]`."""
        if self._out_ND is None:
            return torch.zeros_like(self._x_TD)
        out_ND, order_N = self._out_ND, self._order_N
        if getattr(self._module, "has_post_expert_norm", False):
            out_ND = self._module.post_expert_norm(out_ND)
        weighted_ND = out_ND * self._weight_TK.reshape(-1)[order_N].unsqueeze(-1)
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
        summed_TD = weighted_ND[place_N].view(self.num_tokens, self.top_k, -1).sum(dim=1)
        return summed_TD.to(self._x_TD.dtype)

    def _linear(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.mm(rows.to(weight.dtype), weight if self._module.is_transposed else weight.t())


def _spans(sorted_ids: list[int], num_experts: int) -> dict[int, tuple[int, int]]:
    spans: dict[int, tuple[int, int]] = {}
    start = 0
    for position in range(1, len(sorted_ids) + 1):
        if position == len(sorted_ids) or sorted_ids[position] != sorted_ids[start]:
            if sorted_ids[start] < num_experts:
                spans[sorted_ids[start]] = (start, position)
            start = position
    return spans


def can_group(layer: ExpertLayer) -> bool:
    """Whether `torch.nn.functional.grouped_mm` accepts the shapes of this layer."""
    return all(
        length * parameter.dtype.itemsize % GROUPED_ALIGNMENT_BYTES == 0
        for parameter in layer.parameters
        for length in parameter.shape
    )


def eager_forward(
    module: Any,
    fetch: Callable[[int], Mapping[str, torch.Tensor]],
    num_experts: int,
    x_TD: torch.Tensor,
    expert_TK: torch.Tensor,
    weight_TK: torch.Tensor,
) -> torch.Tensor:
    """Run the model's own loop over experts, with weights that are fetched when the loop asks for them.

    Args:
        fetch: gives an expert's weights.
    """
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    for name in names:
        module.__dict__[name] = _FetchedWeight(name, fetch, num_experts, x_TD)
    try:
        result: torch.Tensor = type(module).forward.__wrapped__(module, x_TD, expert_TK, weight_TK)
        return result
    finally:
        for name in names:
            del module.__dict__[name]


class _FetchedWeight:
    """Looks like `weight[E, ...]` to a loop that indexes it with one expert at a time."""

    def __init__(
        self, name: str, fetch: Callable[[int], Mapping[str, torch.Tensor]], num_experts: int, like: torch.Tensor
    ) -> None:
        self._name, self._fetch = name, fetch
        self.dtype, self.device, self.shape = like.dtype, like.device, (num_experts,)

    def __getitem__(self, expert: Any) -> torch.Tensor:
        return self._fetch(int(expert))[self._name]
