"""What one expert computes for its own rows, and the gradients of what it was given.

Shapes: T tokens, K experts per token, N routed rows sorted by expert, n rows of one expert, m rows filled up with some
that do not count, D model width, F expert width, I inputs, r rank of an adapter.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from ...compute.adapters import LowRank
from ...compute.routed_rows import ExpertSpans

Weights = Mapping[str, torch.Tensor]
ROWS_STEP = 32
"""Rows of an expert's bfloat16 products are filled up to a multiple of this, where passes are joined. oneDNN compiles a
kernel for every new number of rows: 11 ms for a product that takes 5, and it keeps 1,024 of them, fewer than a step of
some hundred tokens has. Two cores of an Intel processor; other steps were not tried."""


@dataclass(frozen=True)
class Seen:
    """One expert as one pass sees it.

    Args:
        weights: the two matrices by parameter name.
        adapters: by parameter name.

    Those that require gradients get them in the backward pass.
    """

    weights: Weights
    adapters: Mapping[str, LowRank] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One pass at one experts module; `grad_TD` in the backward pass only."""

    x_TD: torch.Tensor
    expert_TK: torch.Tensor
    weight_TK: torch.Tensor
    grad_TD: torch.Tensor | None = None


class FrozenKernel(Protocol):
    """What computes experts with frozen matrices in both directions; see `frozen.FrozenExperts`."""

    def pass_back(
        self, expert: int, seen: Seen, x_nD: torch.Tensor, weight_n: torch.Tensor, grad_nD: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of an expert's rows and of their weights."""
        ...


def filled_rows(module: Any, expert: int, seen: Seen, x_nD: torch.Tensor) -> torch.Tensor:
    """`expert_rows`, with rows of zeros after them while it computes in bfloat16: their number has few values."""
    missing = missing_rows(x_nD, len(x_nD))
    if not missing:
        return expert_rows(module, expert, seen, x_nD)
    return expert_rows(module, expert, seen, nn.functional.pad(x_nD, (0, 0, 0, missing)))[: len(x_nD)]


def missing_rows(like: torch.Tensor, count: int) -> int:
    """How many rows `count` rows are filled up with, of the dtype and device of a tensor."""
    return -count % ROWS_STEP if like.dtype == torch.bfloat16 and like.device.type == "cpu" else 0


def expert_rows(module: Any, expert: int, seen: Seen, x_nD: torch.Tensor) -> torch.Tensor:
    """One expert's outputs for its own rows, `[n, D]`, before they are weighted."""
    out = _linear(module, expert, seen, _hidden(module, expert, seen, x_nD), "down_proj")
    return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out


def _hidden(module: Any, expert: int, seen: Seen, x_nD: torch.Tensor) -> torch.Tensor:
    """What goes into the last product, `[n, F]`."""
    up = _linear(module, expert, seen, x_nD, "gate_up_proj" if module.has_gate else "up_proj")
    hidden_nF: torch.Tensor = module._apply_gate(up) if module.has_gate else module.act_fn(up)
    return hidden_nF


def _linear(module: Any, expert: int, seen: Seen, x_nI: torch.Tensor, name: str) -> torch.Tensor:
    weight = seen.weights[name]
    x_nI = x_nI.to(weight.dtype)
    out = x_nI @ (weight if module.is_transposed else weight.t())
    if module.has_bias:
        out = out + getattr(module, f"{name}_bias")[expert]
    return seen.adapters[name].added_to(out, x_nI) if name in seen.adapters else out


class RowGradients:
    """The gradients of one pass at one experts module.

    Args:
        call: inputs, routing, and the gradient of the output.
        spans: which rows belong to which expert.
    """

    def __init__(self, call: Call, spans: ExpertSpans) -> None:
        self.spans, self._call = spans, call
        self._order_N = torch.sort(call.expert_TK.reshape(-1))[1]
        self._x_ND = torch.zeros(len(self._order_N), call.x_TD.shape[1], dtype=call.x_TD.dtype)
        self._weight_N = torch.zeros(len(self._order_N), dtype=call.weight_TK.dtype)

    def pass_through(self, compute: Callable[..., torch.Tensor], module: Any, expert: int, seen: Seen) -> None:
        """Compute an expert's rows once more and take their gradients."""
        start, stop = self.spans.of[expert]
        token_n, call = self.spans.token_N[start:stop], self._call
        assert call.grad_TD is not None
        with torch.enable_grad():
            x_nD = call.x_TD[token_n].detach().requires_grad_()
            weight_n = call.weight_TK.reshape(-1)[self._order_N[start:stop]].detach().requires_grad_()
            out_nD = compute(module, expert, seen, x_nD) * weight_n.unsqueeze(-1)
            out_nD.backward(call.grad_TD[token_n].to(out_nD.dtype))
        assert x_nD.grad is not None
        assert weight_n.grad is not None
        self._x_ND[start:stop], self._weight_N[start:stop] = x_nD.grad, weight_n.grad

    def pass_through_frozen(self, module: Any, expert: int, seen: Seen) -> None:
        """The same where matrices are frozen, without the last product: its result is in no gradient.

        A row's output is linear in what goes into the last product, so that is weighted instead of the output.
        """
        start, stop = self.spans.of[expert]
        rows, call, down = stop - start, self._call, seen.weights["down_proj"]
        assert call.grad_TD is not None
        missing = missing_rows(call.x_TD, rows)
        token_m = nn.functional.pad(self.spans.token_N[start:stop], (0, missing))
        grad_mD = call.grad_TD[token_m].to(down.dtype)
        grad_mD[rows:] = 0
        with torch.enable_grad():
            x_mD = call.x_TD[token_m].detach().requires_grad_()
            weight_n = call.weight_TK.reshape(-1)[self._order_N[start:stop]].detach().requires_grad_()
            weight_m1 = nn.functional.pad(weight_n, (0, missing)).unsqueeze(-1)
            hidden_mF = _hidden(module, expert, seen, x_mD) * weight_m1
        grad_mF = grad_mD @ (down.t() if module.is_transposed else down)
        if (low := seen.adapters.get("down_proj")) is not None:
            low.pass_back(hidden_mF.detach().to(down.dtype), grad_mD, grad_mF)
        hidden_mF.backward(grad_mF.to(hidden_mF.dtype))
        assert x_mD.grad is not None
        assert weight_n.grad is not None
        self._x_ND[start:stop], self._weight_N[start:stop] = x_mD.grad[:rows], weight_n.grad
        if module.has_bias:
            self._weight_N[start:stop] += grad_mD[:rows] @ module.down_proj_bias[expert].to(down.dtype)

    def pass_through_kernel(self, kernel: FrozenKernel, expert: int, seen: Seen) -> None:
        """The same by our C."""
        start, stop = self.spans.of[expert]
        token_n, call = self.spans.token_N[start:stop], self._call
        assert call.grad_TD is not None
        weight_n = call.weight_TK.detach().reshape(-1)[self._order_N[start:stop]].float()
        grad_nD = call.grad_TD[token_n].to(torch.bfloat16)
        found = kernel.pass_back(expert, seen, call.x_TD.detach()[token_n], weight_n, grad_nD)
        self._x_ND[start:stop], self._weight_N[start:stop] = found

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradients of `x_TD` and `weight_TK`."""
        place_N = torch.empty_like(self._order_N)
        place_N[self._order_N] = torch.arange(len(place_N))
        # in the order of experts, each sum rounded, as autograd adds rows to tokens; that is slower by far
        place_KT = place_N.view(self._call.expert_TK.shape).sort(1)[0].t()
        x_TD = self._x_ND[place_KT[0]]
        for place_T in place_KT[1:]:
            x_TD += self._x_ND[place_T]
        weight_TK = torch.zeros_like(self._call.weight_TK)
        weight_TK.view(-1)[self._order_N] = self._weight_N
        return x_TD, weight_TK
