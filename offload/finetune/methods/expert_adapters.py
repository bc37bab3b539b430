"""Adapters of experts while they are trained: PEFT's own tensors, or fewer that several experts share or some lack.

PEFT's format has one adapter for each expert of a layer. Where fewer are trained, each is written to every expert that
has it when the run ends; an expert without one has zeros there, which add nothing.

Shapes: E experts, I inputs, O outputs.
"""

from collections.abc import Mapping, Sequence
from math import ceil

import torch
from torch import nn

from routing.traces import RoutingTrace

from ...compute.adapters import Adapted, AdaptedMatrix, LowRank


class SecondFactors:
    """The second factors of all experts of one matrix, each of them in one piece, while their layer is computed.

    PEFT keeps the numbers of one expert E apart, so that each of them is in a line of the cache of its own.
    """

    def __init__(self, matrix: AdaptedMatrix) -> None:
        self._matrix = matrix
        self._b_ErO = matrix.b_OrE.detach().permute(2, 1, 0).contiguous()
        self._grad_ErO: torch.Tensor | None = None

    def of(self, expert: int) -> torch.Tensor:
        """An expert's factor, `[O, r]`."""
        return self._b_ErO[expert].t()

    def add(self, expert: int, grad_Or: torch.Tensor | None) -> None:
        """Add to the gradient of an expert's factor."""
        assert grad_Or is not None
        if self._grad_ErO is None:
            self._grad_ErO = torch.zeros_like(self._b_ErO)
        self._grad_ErO[expert] += grad_Or.t()

    def leave(self) -> None:
        """Add what was collected to the gradient of PEFT's tensor."""
        if self._grad_ErO is not None:
            _grad_of(self._matrix.weights[1]).view(self._matrix.b_OrE.shape).add_(self._grad_ErO.permute(2, 1, 0))


class ExpertAdapters:
    """One adapter for each expert, in PEFT's own tensors.

    Args:
        adapted_L: PEFT's wrappers of each layer; none where experts are not adapted.
    """

    def __init__(self, adapted_L: Sequence[Adapted]) -> None:
        self._adapted_L = list(adapted_L)
        self._layer = -1
        self._near: dict[str, SecondFactors] = {}
        self.parameters: list[nn.Parameter] = []
        """Trained tensors that PEFT does not know."""

    def factors(self, layer: int, expert: int) -> dict[str, LowRank]:
        """An expert's adapters by parameter name; their factors collect gradients."""
        self._go_to(layer)
        pairs = ((name, matrix, self._near[name]) for name, matrix in self._adapted_L[layer].items())
        return {
            name: _leaf(LowRank(matrix.a_ErI[expert], near.of(expert), matrix.scale)) for name, matrix, near in pairs
        }

    def take(self, layer: int, expert: int, factors: Mapping[str, LowRank]) -> None:
        """Add what the factors of one expert have collected to the gradients of PEFT's tensors."""
        self._go_to(layer)
        for name, matrix in self._adapted_L[layer].items():
            _grad_of(matrix.weights[0]).view(matrix.a_ErI.shape)[expert] += factors[name].a_rI.grad
            self._near[name].add(expert, factors[name].b_Or.grad)

    def finish(self) -> None:
        """All gradients of a step are there; experts that no token visited have zeros, as in a resident model."""
        self._go_to(-1)
        for adapted in self._adapted_L:
            for matrix in adapted.values():
                for weight in matrix.weights:
                    _grad_of(weight)

    def _go_to(self, layer: int) -> None:
        """Bring the second factors of one layer near, and leave those of the last one; -1 for no layer."""
        if layer == self._layer:
            return
        for near in self._near.values():
            near.leave()
        adapted = {} if layer < 0 else self._adapted_L[layer]
        self._layer, self._near = layer, {name: SecondFactors(matrix) for name, matrix in adapted.items()}

    def publish(self) -> None:
        """PEFT's tensors hold everything already."""


class OwnedAdapters(ExpertAdapters):
    """Fewer adapters than experts: one for all experts of a layer, or one for each of some.

    Args:
        adapted_L: PEFT's wrappers of each layer; an adapter begins as that of the first expert that has it.
        owner_LE: for each layer and expert the number of its adapter, counted from 0 in each layer; None for none.
    """

    def __init__(self, adapted_L: Sequence[Adapted], owner_LE: Sequence[Sequence[int | None]]) -> None:
        super().__init__(adapted_L)
        self._owner_LE = owner_LE
        self._own: dict[tuple[int, int], dict[str, LowRank]] = {}
        for layer, (adapted, owner_E) in enumerate(zip(adapted_L, owner_LE, strict=True)):
            for expert, owner in enumerate(owner_E):
                if owner is not None and (layer, owner) not in self._own:
                    self._own[layer, owner] = {name: _own(matrix.of(expert)) for name, matrix in adapted.items()}
        self.parameters = [part for own in self._own.values() for low in own.values() for part in _factors(low)]
        self._collected: dict[tuple[int, int], Mapping[str, LowRank]] = {}
        for adapted in adapted_L:
            for matrix in adapted.values():
                for weight in matrix.weights:
                    weight.requires_grad_(False)

    def factors(self, layer: int, expert: int) -> dict[str, LowRank]:
        owner = self._owner_LE[layer][expert]
        return {} if owner is None else {name: _leaf(low) for name, low in self._own[layer, owner].items()}

    def take(self, layer: int, expert: int, factors: Mapping[str, LowRank]) -> None:
        if factors:
            self._collected[layer, expert] = factors

    def finish(self) -> None:
        """Add the gradients of all experts, in the order of their ids whichever was there first."""
        for weight in self.parameters:
            _grad_of(weight)
        for (layer, expert), factors in sorted(self._collected.items(), key=lambda pair: pair[0]):
            owner = self._owner_LE[layer][expert]
            assert owner is not None
            for name, low in self._own[layer, owner].items():
                for weight, part in zip(_factors(low), _factors(factors[name]), strict=True):
                    _grad_of(weight).add_(part.grad)
        self._collected.clear()

    @torch.no_grad()
    def publish(self) -> None:
        """Write each adapter into the place of every expert that has it."""
        for layer, (adapted, owner_E) in enumerate(zip(self._adapted_L, self._owner_LE, strict=True)):
            for name, matrix in adapted.items():
                matrix.b_OrE.zero_()
                for expert, owner in enumerate(owner_E):
                    if owner is not None:
                        low = self._own[layer, owner][name]
                        matrix.a_ErI[expert] = low.a_rI
                        matrix.b_OrE[:, :, expert] = low.b_Or


def num_chosen(share: float, num_experts: int) -> int:
    """How many of a layer's experts a share of them is, at least one."""
    return ceil(share * num_experts)


def most_used(trace: RoutingTrace, share: float, experts_L: Sequence[int]) -> list[list[int | None]]:
    """Adapters for the most used experts of each layer, one each; among equals the lower id goes first.

    Args:
        trace: recorded with the model.
        share: of a layer's experts, in (0, 1].
        experts_L: experts of each MoE layer.

    Returns:
        As `OwnedAdapters` takes it.

    Raises:
        ValueError: if the trace is of another number of layers or experts.

    Source: Wang et al. 2024 (ESFT), arXiv:2407.01906, which trains the experts that tokens of a task select most.
    """
    if trace.num_layers != len(experts_L) or (trace.num_experts > max(experts_L)):
        raise ValueError(
            f"the trace has {trace.num_layers} layers of {trace.num_experts} experts, the model {len(experts_L)} of "
            f"{max(experts_L)}; record one with `expertier trace record MODEL`"
        )
    found: list[list[int | None]] = []
    for layer, num_experts in enumerate(experts_L):
        chosen_N = trace.expert_TLK[:, layer].reshape(-1)
        counts = torch.bincount(torch.from_numpy(chosen_N[chosen_N >= 0].astype("int64")), minlength=num_experts)
        order = torch.sort(counts, descending=True, stable=True)[1][: num_chosen(share, num_experts)].tolist()
        owners = {expert: owner for owner, expert in enumerate(sorted(order))}
        found.append([owners.get(expert) for expert in range(num_experts)])
    return found


def _leaf(low: LowRank) -> LowRank:
    """The same numbers with gradients of their own."""
    return LowRank(*(part.detach().requires_grad_() for part in _factors(low)), low.scale)


def _own(low: LowRank) -> LowRank:
    return LowRank(*(nn.Parameter(part.detach().clone()) for part in _factors(low)), low.scale)


def _factors(low: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    return low.a_rI, low.b_Or


def _grad_of(weight: torch.Tensor) -> torch.Tensor:
    """The gradient of a trained tensor, zeros at first."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad
