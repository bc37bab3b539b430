"""What one expert computes, in the arithmetic of the implementation that transformers itself would use.

On the CPU that is `grouped_mm`, which needs rows of a multiple of 16 bytes; models with other shapes run in
transformers only with `experts_implementation="eager"`, so for those the model's own loop over experts is run here too.

Shapes: T tokens, K experts per token, N = T * K routed rows sorted by expert, n the rows of one expert, D model width,
F expert width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..checkpoint.experts import ExpertLayer
from .adapters import adapted_of
from .matvec import Matvecs

GROUPED_ALIGNMENT_BYTES = 16
"""`grouped_mm` of torch refuses rows of anything but a multiple."""
VECTOR_ELEMENTS = 64
"""Elements at a time in torch's vectorised activations, at most (two registers of 32 bfloat16 numbers). A remainder
goes through another routine, whose last bits can differ; so shapes with a remainder are not computed piece by piece."""


class ExpertSpans:
    """Which rows of one call belong to which expert, one expert after the other, and how their outputs go to tokens.

    Rows are sorted by expert; those of a single token whose experts all differ may stay as they are, which is quicker.

    Args:
        expert_TK: expert ids.
        num_experts: E; ids outside 0..E-1 are left out.
        is_sorted: whether the rows of a single token are to be sorted too.
    """

    def __init__(self, expert_TK: torch.Tensor, num_experts: int, *, is_sorted: bool = True) -> None:
        self.num_tokens, self.top_k = expert_TK.shape
        self._order_N: torch.Tensor | None = None
        experts = expert_TK[0].tolist() if self.num_tokens == 1 and not is_sorted else []
        if experts and len(set(experts)) == len(experts):
            self.token_N = torch.zeros(self.top_k, dtype=torch.int64)
            self.of = {expert: (k, k + 1) for k, expert in enumerate(experts) if 0 <= expert < num_experts}
        else:
            expert_N, self._order_N = torch.sort(expert_TK.reshape(-1))
            self.token_N = self._order_N // self.top_k
            self.of = _spans(expert_N.tolist(), num_experts)

    @property
    def num_rows(self) -> dict[int, int]:
        """Rows of each expert that has any."""
        return {expert: stop - start for expert, (start, stop) in self.of.items()}

    def tokens_of(self, experts: Sequence[int]) -> torch.Tensor:
        """The token of each row of some experts, one expert after the other."""
        if self._order_N is None:
            return self.token_N[: len(experts)]
        spans = [self.of[expert] for expert in experts]
        return torch.cat([self.token_N[start:stop] for start, stop in spans])

    def combine(self, out_ND: torch.Tensor, weight_TK: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weighted sum over each token's experts, `[T, D]`, as transformers adds it."""
        weight_N, order_N = weight_TK.reshape(-1), self._order_N
        if order_N is None:
            return (out_ND * weight_N.unsqueeze(-1))[None].sum(dim=1).to(dtype)
        weighted_ND = out_ND * weight_N[order_N].unsqueeze(-1)
        place_N = torch.empty_like(order_N)
        place_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
        return weighted_ND[place_N].view(self.num_tokens, self.top_k, -1).sum(dim=1).to(dtype)


class RoutedRows:
    """The rows of one call, sorted by expert, and the weighted sum of their outputs.

    The matrix products have the same shapes, and the sums the same order, as in
    `transformers.integrations.moe.grouped_mm_experts_forward`, whatever the order in which the experts are computed.

    Args:
        module: the experts module, for its layout flags, biases, gate and norm.
        x_TD: hidden states.
        expert_TK: expert ids; ids >= E are left out (they contribute nothing).
        weight_TK: combine weights.
        matvecs: products for experts with a few rows.
    """

    def __init__(
        self,
        module: Any,
        num_experts: int,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        matvecs: Matvecs,
    ) -> None:
        self._module, self._matvecs = module, matvecs
        self._adapted = adapted_of(module)
        self._up_name = "gate_up_proj" if module.has_gate else "up_proj"
        self._x_TD, self._weight_TK = x_TD, weight_TK
        self._spans = ExpertSpans(expert_TK, num_experts)
        self._x_ND = x_TD[self._spans.token_N]
        self.span = self._spans.of
        self._up: torch.Tensor | None = None
        self._gated: torch.Tensor | None = None
        self._out: torch.Tensor | None = None

    @property
    def num_rows(self) -> dict[int, int]:
        """Rows of each expert that has any."""
        return self._spans.num_rows

    def start(self, expert: int, weights: Mapping[str, torch.Tensor]) -> None:
        """Compute as much of one expert as needs no other expert; all of them stay until `finish`.

        The bits of an elementwise operation may depend on an element's place: vector instructions and their scalar
        remainder round differently. Where no remainder can occur, the expert is computed to its end; otherwise its gate
        has to wait for all rows.
        """
        if self.compute_several((expert,), (weights,)):
            return
        if self._can_gate_alone(weights):
            self.compute(expert, weights)
        else:
            self._first_product(expert, weights)

    def compute_several(self, experts: Sequence[int], weights: Sequence[Mapping[str, torch.Tensor]]) -> bool:
        """All of several experts with one row each, in two products; False, and nothing done, if that cannot be."""
        first = weights[0]
        is_plain = not (self._module.has_bias or self._module.is_transposed or self._adapted)
        if not is_plain or not self._can_gate_alone(first):
            return False
        if any(stop - start != 1 for start, stop in (self.span[expert] for expert in experts)):
            return False
        row_n = torch.tensor([self.span[expert][0] for expert in experts])
        up_weights = [weight[self._up_name] for weight in weights]
        up_nF = self._x_ND.new_empty(len(experts), up_weights[0].shape[0])
        if not self._matvecs.multiply_each(self._x_ND[row_n], up_weights, list(up_nF)):
            return False
        gated_nF = self._apply_gate(up_nF)
        down_nD = self._x_ND.new_empty(len(experts), first["down_proj"].shape[0])
        if not self._matvecs.multiply_each(gated_nF, [weight["down_proj"] for weight in weights], list(down_nD)):
            return False
        if self._out is None:
            self._out = torch.zeros(self._x_ND.shape[0], down_nD.shape[1], dtype=down_nD.dtype)
        self._out[row_n] = down_nD
        return True

    def gate(self) -> None:
        """Gate or activation on the rows of all experts, unless each had its own."""
        if self._up is not None and self._gated is None:
            self._gated = self._apply_gate(self._up)

    def finish(self, expert: int, weights: Mapping[str, torch.Tensor]) -> None:
        """What `start` left over."""
        if not self._can_gate_alone(weights):
            self._second_product(expert, weights)

    def compute(self, expert: int, weights: Mapping[str, torch.Tensor]) -> None:
        """All of one expert, for when not all experts can be held at the same time.

        A gate that cannot run alone runs over the rows of all experts, in the same places as in `gate`, and only this
        expert's are used.
        """
        self._first_product(expert, weights)
        assert self._up is not None
        start, stop = self.span[expert]
        if self._can_gate_alone(weights):
            gated = self._apply_gate(self._up[start:stop])
            if self._gated is None:
                self._gated = gated.new_empty(self._up.shape[0], gated.shape[1])
            self._gated[start:stop] = gated
        else:
            self._gated = self._apply_gate(self._up)
        self._second_product(expert, weights)

    def combine(self) -> torch.Tensor:
        """The weighted sum over each token's experts, `[T, D]`."""
        if self._out is None:
            return torch.zeros_like(self._x_TD)
        out_ND = self._out
        if getattr(self._module, "has_post_expert_norm", False):
            out_ND = self._module.post_expert_norm(out_ND)
        return self._spans.combine(out_ND, self._weight_TK, self._x_TD.dtype)

    def _can_gate_alone(self, weights: Mapping[str, torch.Tensor]) -> bool:
        """Whether the gate has the same bits on one expert's rows as on all: no remainder in any thread's share."""
        parts = 2 if self._module.has_gate else 1
        width = weights[self._up_name].numel() // self._x_ND.shape[1] // parts
        threads = torch.get_num_threads()
        return width % VECTOR_ELEMENTS == 0 and self._x_ND.shape[0] * width % (VECTOR_ELEMENTS * threads) == 0

    def _first_product(self, expert: int, weights: Mapping[str, torch.Tensor]) -> None:
        self._up = self._linear(self._up, expert, self._x_ND, weights[self._up_name], self._up_name)

    def _second_product(self, expert: int, weights: Mapping[str, torch.Tensor]) -> None:
        assert self._gated is not None
        self._out = self._linear(self._out, expert, self._gated, weights["down_proj"], "down_proj")

    def _apply_gate(self, rows: torch.Tensor) -> torch.Tensor:
        module = self._module
        gated: torch.Tensor = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)
        return gated

    def _linear(
        self, out: torch.Tensor | None, expert: int, rows: torch.Tensor, weight: torch.Tensor, name: str
    ) -> torch.Tensor:
        weight = weight if self._module.is_transposed else weight.t()
        if out is None:
            out = torch.zeros(rows.shape[0], weight.shape[1], dtype=weight.dtype, device=weight.device)
        start, stop = self.span[expert]
        mine = rows[start:stop].to(weight.dtype)
        if not self._matvecs.multiply(mine, (weight.t(),), (out[start:stop],)):
            torch.mm(mine, weight, out=out[start:stop])
        if self._module.has_bias:
            out[start:stop].add_(getattr(self._module, f"{name}_bias")[expert])
        if name in self._adapted:
            out[start:stop].add_(self._adapted[name].of(expert)(mine))
        return out


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
