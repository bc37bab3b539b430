"""What the experts of a layer compute for several passes, and its gradients, one expert at a time.

The forward pass keeps its inputs and the routing. The backward pass visits the same experts again and computes each
once more, with gradients: nothing is routed twice, and no layer keeps more than its inputs.

Shapes: T tokens, K experts per token, N routed rows sorted by expert, n rows of one expert, D model width.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from ...compute.matvec import Matvecs
from ...compute.routed_rows import ExpertSpans
from ...memory.heap import KeptBlocks
from ..storage.activations import SpilledActivations
from ..storage.units import UNIT
from ..storage.visits import ExpertVisits
from .exact import ExactExperts, exact_experts
from .frozen import FrozenExperts, frozen_experts
from .lockstep import Lockstep
from .rows import Call, RowGradients, Seen, Weights, expert_rows, filled_rows


class Method(Protocol):
    """What a method of fine-tuning does with experts."""

    joins_passes: bool
    """Whether an expert computes the rows of all passes in one product: they see the same frozen matrices, and nobody
    needs to know which pass a gradient is from. Sums then have another order than pass by pass."""

    def seen(self, layer: int, expert: int, stored: Weights) -> Callable[[int], Seen]:
        """An expert in its slot: called once per visit, gives what each pass sees."""
        ...

    def take(self, layer: int, expert: int, seen: Sequence[Seen]) -> None:
        """The gradients of one expert are there, in what each pass that used it has seen."""
        ...

    def enter(self, number: int) -> None:
        """Pass `number` goes on."""
        ...


class TunedExperts:
    """All experts modules of a model, computed for passes that meet.

    Args:
        modules: the experts modules, in the order of the layers; their `forward` is replaced.
        visits: where their experts are.
        lockstep: runs the passes, and carries what they ask.
        blocks: that are free, and go back to the system where passes meet; None leaves them to the allocator.
    """

    def __init__(
        self, modules: Sequence[Any], visits: ExpertVisits, lockstep: Lockstep, blocks: KeptBlocks | None = None
    ) -> None:
        self.visits, self.lockstep, self._blocks = visits, lockstep, blocks
        self.method: Method | None = None
        self.count_LE = [torch.zeros(form.layer.num_experts, dtype=torch.int64) for form in visits.forms]
        """Rows that each expert computed; whoever reads the counts sets them to 0."""
        self.spilled: SpilledActivations | None = None
        """Takes outputs for decoder layers that are computed again."""
        self._modules = list(modules)
        self._kernels: dict[int, FrozenExperts | None] = {}
        self._exact: dict[int, ExactExperts | None] = {}
        self._matvecs = Matvecs("exact")
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
        if self._blocks is not None:
            self._blocks.trim()
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
        num_experts = len(self.count_LE[layer])
        spans = [ExpertSpans(call.expert_TK, num_experts) for call in calls]
        x = [call.x_TD[span.token_N] for call, span in zip(calls, spans, strict=True)]
        outs: list[torch.Tensor | None] = [None] * len(calls)
        exact = self._exact_kernel(layer, calls[0].expert_TK.shape[1])
        if exact is not None:
            exact.expect({count for span in spans for count in span.num_rows.values()})
        for expert, seen, numbers in self._visit(layer, spans):
            given = [x[number][slice(*spans[number].of[expert])] for number in numbers]
            found = self._rows(layer, expert, numbers, [seen(number) for number in numbers], given, exact)
            for number, rows in zip(numbers, found, strict=True):
                start, stop = spans[number].of[expert]
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
                kernel = self._kernel(layer, used[-1])
                if kernel is not None:
                    grads[number].pass_through_kernel(kernel, expert, used[-1])
                elif self.method.joins_passes and not getattr(module, "has_post_expert_norm", False):
                    grads[number].pass_through_frozen(module, expert, used[-1])
                else:
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

    def _rows(
        self,
        layer: int,
        expert: int,
        numbers: Sequence[int],
        seen: Sequence[Seen],
        x: Sequence[torch.Tensor],
        exact: ExactExperts | None,
    ) -> list[torch.Tensor]:
        """What an expert gives for the rows of some passes."""
        if (kernel := self._kernel(layer, seen[0])) is not None:
            return [kernel.outputs(expert, of_pass, x_nD) for of_pass, x_nD in zip(seen, x, strict=True)]
        found: list[torch.Tensor | None] = [None] * len(x) if exact is None else exact.outputs(seen, x)
        module, compute = self._modules[layer], self._rows_of()
        return [
            self._entered(number, compute, module, expert, of_pass, x_nD) if out is None else out
            for number, of_pass, x_nD, out in zip(numbers, seen, x, found, strict=True)
        ]

    def _exact_kernel(self, layer: int, top_k: int) -> ExactExperts | None:
        """What computes an expert without torch, where its bits are promised."""
        assert self.method is not None
        if self.method.joins_passes:
            return None
        if layer not in self._exact:
            form, module = self.visits.forms[layer], self._modules[layer]
            self._exact[layer] = exact_experts(module, form, top_k, self._matvecs)
        return self._exact[layer]

    def _kernel(self, layer: int, seen: Seen) -> FrozenExperts | None:
        """What computes an expert without torch, where no bits of torch are promised."""
        assert self.method is not None
        if not self.method.joins_passes:
            return None
        if layer not in self._kernels:
            self._kernels[layer] = frozen_experts(self._modules[layer], self.visits.forms[layer].layer)
        kernel = self._kernels[layer]
        return kernel if kernel is not None and kernel.takes(seen) else None

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
