"""What the experts of a layer compute for several passes, and its gradients, one expert at a time.

The forward pass keeps its inputs and the routing. The backward pass visits the same experts again and computes each
once more, with gradients: nothing is routed twice, and no layer keeps more than its inputs.

Shapes: T tokens, K experts per token, N routed rows sorted by expert, n rows of one expert, D model width.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any, Protocol

import torch
from torch import nn

from ...compute.adapters import LowRank
from ...compute.routed_rows import ExpertSpans
from ...memory.heap import return_free_blocks_beyond
from ..storage.activations import SpilledActivations
from ..storage.units import UNIT
from ..storage.visits import ExpertVisits
from .lockstep import Lockstep

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


class Method(Protocol):
    """What a method of fine-tuning does with experts."""

    joins_passes: bool
    """Whether an expert computes the rows of all passes in one product: they see the same, and nobody needs to know
    which pass a gradient is from. Sums then have another order than pass by pass."""

    def seen(self, layer: int, expert: int, stored: Weights) -> Callable[[int], Seen]:
        """An expert in its slot: called once per visit, gives what each pass sees."""
        ...

    def take(self, layer: int, expert: int, seen: Sequence[Seen]) -> None:
        """The gradients of one expert are there, in what each pass that used it has seen."""
        ...

    def enter(self, number: int) -> None:
        """Pass `number` goes on."""
        ...


@dataclass(frozen=True)
class Call:
    """One pass at one experts module; `grad_TD` in the backward pass only."""

    x_TD: torch.Tensor
    expert_TK: torch.Tensor
    weight_TK: torch.Tensor
    grad_TD: torch.Tensor | None = None


def filled_rows(module: Any, expert: int, seen: Seen, x_nD: torch.Tensor) -> torch.Tensor:
    """`expert_rows`, with rows of zeros after them while it computes in bfloat16: their number has few values."""
    missing = -len(x_nD) % ROWS_STEP
    if x_nD.dtype != torch.bfloat16 or x_nD.device.type != "cpu" or not missing:
        return expert_rows(module, expert, seen, x_nD)
    return expert_rows(module, expert, seen, nn.functional.pad(x_nD, (0, 0, 0, missing)))[: len(x_nD)]


def expert_rows(module: Any, expert: int, seen: Seen, x_nD: torch.Tensor) -> torch.Tensor:
    """One expert's outputs for its own rows, `[n, D]`, before they are weighted."""
    up = _linear(module, expert, seen, x_nD, "gate_up_proj" if module.has_gate else "up_proj")
    out = _linear(module, expert, seen, module._apply_gate(up) if module.has_gate else module.act_fn(up), "down_proj")
    return module.post_expert_norm(out) if getattr(module, "has_post_expert_norm", False) else out


def _linear(module: Any, expert: int, seen: Seen, x_nI: torch.Tensor, name: str) -> torch.Tensor:
    weight = seen.weights[name]
    out = x_nI.to(weight.dtype) @ (weight if module.is_transposed else weight.t())
    if module.has_bias:
        out = out + getattr(module, f"{name}_bias")[expert]
    return out + seen.adapters[name](x_nI) if name in seen.adapters else out


class TunedExperts:
    """All experts modules of a model, computed for passes that meet.

    Args:
        modules: the experts modules, in the order of the layers; their `forward` is replaced.
        visits: where their experts are.
        lockstep: runs the passes, and carries what they ask.
        memory_bytes: of the process, beyond which freed blocks go back to the system.
    """

    def __init__(
        self, modules: Sequence[Any], visits: ExpertVisits, lockstep: Lockstep, memory_bytes: float = inf
    ) -> None:
        self.visits, self.lockstep, self._memory_bytes = visits, lockstep, memory_bytes
        self.method: Method | None = None
        self.count_LE = [torch.zeros(form.layer.num_experts, dtype=torch.int64) for form in visits.forms]
        """Rows that each expert computed; whoever reads the counts sets them to 0."""
        self.spilled: SpilledActivations | None = None
        """Takes outputs for decoder layers that are computed again."""
        self._modules = list(modules)
        # whatever needs a gradient further down, a layer's own experts may have parameters of their own
        self._anchor = torch.zeros((), requires_grad=True)
        for layer, module in enumerate(modules):
            module.forward = partial(self._forward, layer)

    def _forward(
        self, layer: int, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        out: torch.Tensor = _Experts.apply(hidden_states, top_k_weights, self._anchor, top_k_index, self, layer)
        return out

    def outputs(self, layer: int, call: Call) -> torch.Tensor:
        """What one pass gets at one experts module; where a decoder layer is computed again, what it got before.

        Raises:
            RuntimeError: if tokens are routed otherwise than before.
        """
        unit = UNIT.get()
        if unit is not None and unit.is_rerun:
            expert_TK, out = unit.outputs.pop(0)
            if not torch.equal(expert_TK, call.expert_TK):
                raise RuntimeError(f"MoE layer {layer} routes otherwise when it is computed again; nothing is learnt")
            assert self.spilled is not None
            return self.spilled.unpack(out)
        started = time.perf_counter()
        asked: torch.Tensor = self.lockstep.ask((layer, False), call)
        if unit is not None:
            unit.elsewhere_s += time.perf_counter() - started
            if unit.choice == "recomputed":
                assert self.spilled is not None
                # a copy: some families add to it in place
                unit.outputs.append((call.expert_TK, self.spilled.pack(asked.clone())))
        return asked

    def answer(self, place: Any, calls: Sequence[Call]) -> Sequence[Any]:
        """What all passes get at one experts module: outputs, or the gradients of inputs and weights."""
        assert self.method is not None
        return_free_blocks_beyond(self._memory_bytes)
        layer, is_backward = place
        tokens = [len(call.x_TD) for call in calls]
        asked = [_joined(calls)] if self.method.joins_passes else calls
        if is_backward:
            grads = self._backward(layer, asked)
            return grads if asked is calls else list(zip(*(grad.split(tokens) for grad in grads[0]), strict=True))
        outs = self._outputs(layer, asked)
        return outs if asked is calls else outs[0].split(tokens)

    @torch.no_grad()
    def _outputs(self, layer: int, calls: Sequence[Call]) -> list[torch.Tensor]:
        module, num_experts = self._modules[layer], len(self.count_LE[layer])
        spans = [ExpertSpans(call.expert_TK, num_experts) for call in calls]
        x = [call.x_TD[span.token_N] for call, span in zip(calls, spans, strict=True)]
        outs: list[torch.Tensor | None] = [None] * len(calls)
        for expert, seen, numbers in self._visit(layer, spans):
            for number in numbers:
                start, stop = spans[number].of[expert]
                rows = self._entered(number, self._rows_of(), module, expert, seen(number), x[number][start:stop])
                out = outs[number]
                if out is None:
                    outs[number] = out = rows.new_zeros(len(x[number]), rows.shape[1])
                out[start:stop] = rows
                self.count_LE[layer][expert] += stop - start
        return [
            torch.zeros_like(call.x_TD) if out is None else span.combine(out, call.weight_TK, call.x_TD.dtype)
            for call, span, out in zip(calls, spans, outs, strict=True)
        ]

    def _backward(self, layer: int, calls: Sequence[Call]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        assert self.method is not None
        module, num_experts = self._modules[layer], len(self.count_LE[layer])
        grads = [RowGradients(call, ExpertSpans(call.expert_TK, num_experts)) for call in calls]
        for expert, seen, numbers in self._visit(layer, [grad.spans for grad in grads]):
            used = []
            for number in numbers:
                used.append(seen(number))
                grads[number].pass_through(self._rows_of(), module, expert, used[-1])
            self.method.take(layer, expert, used)
        return [grad.inputs() for grad in grads]

    def _visit(
        self, layer: int, spans: Sequence[ExpertSpans]
    ) -> Iterator[tuple[int, Callable[[int], Seen], list[int]]]:
        """Each expert that any pass needs, as the method shows it, and the passes that need it."""
        assert self.method is not None
        needed = sorted(set().union(*(span.of for span in spans)))
        for expert, stored in self.visits(layer, needed):
            numbers = [number for number, span in enumerate(spans) if expert in span.of]
            yield expert, self.method.seen(layer, expert, stored), numbers

    def _rows_of(self) -> Callable[..., torch.Tensor]:
        """How an expert computes its rows; where bits are promised, as a resident model does."""
        assert self.method is not None
        return filled_rows if self.method.joins_passes else expert_rows

    def _entered(self, number: int, compute: Callable[..., torch.Tensor], module: Any, *given: Any) -> torch.Tensor:
        """Compute with biases and norms as the pass sees them; most modules have none."""
        if module.has_bias or getattr(module, "has_post_expert_norm", False):
            assert self.method is not None
            self.method.enter(number)
        return compute(module, *given)


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


def _joined(calls: Sequence[Call]) -> Call:
    """One call with the tokens of all, one pass after the other."""
    parts = zip(*((call.x_TD, call.expert_TK, call.weight_TK) for call in calls), strict=True)
    x_TD, expert_TK, weight_TK = (torch.cat(part) for part in parts)
    grads = [call.grad_TD for call in calls if call.grad_TD is not None]
    return Call(x_TD, expert_TK, weight_TK, torch.cat(grads) if grads else None)


class _Experts(torch.autograd.Function):
    """One experts module in one pass; both directions wait for the other passes."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Any, weight_TK: Any, anchor: Any, expert_TK: Any, tuned: TunedExperts, layer: int
    ) -> Any:
        ctx.save_for_backward(x_TD, weight_TK)
        # ids are kept whatever becomes of activations: what was routed once is not routed again
        ctx.tuned, ctx.layer, ctx.expert_TK = tuned, layer, expert_TK
        return tuned.outputs(layer, Call(x_TD, expert_TK, weight_TK))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x_TD, weight_TK = ctx.saved_tensors
        call = Call(x_TD, ctx.expert_TK, weight_TK, grads[0])
        grad_TD, grad_TK = ctx.tuned.lockstep.ask((ctx.layer, True), call)
        return grad_TD, grad_TK, None, None, None, None
