"""Resident linear layers on single tokens: our products where they have the bits, siblings of one input together."""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .matvec import Matvecs


def quicken_linears(model: nn.Module, matvecs: Matvecs) -> None:
    """Let the resident bfloat16 linear layers of a model multiply single tokens by `matvecs`."""
    for parent in list(model.modules()):
        siblings = defaultdict(list)
        for child in parent.children():
            if type(child) is nn.Linear and child.weight.dtype == torch.bfloat16 and child.bias is None:
                siblings[child.in_features].append(child)
        for linears in siblings.values():
            group = SiblingLinears(linears, matvecs)
            for number, linear in enumerate(linears):
                linear.forward = functools.partial(group, number, linear.forward)  # type: ignore[method-assign]


@dataclass(eq=False)
class _Round:
    """One input, who asked first, and what was computed besides and not asked for yet."""

    leader: int
    x: torch.Tensor
    ready: dict[int, torch.Tensor]


class SiblingLinears:
    """Linear layers of one module and one input width.

    Those that were given the same numbers as the layer before them (keys and values after queries, for example) are
    multiplied together with it the next time: what is asked for later is there already.

    Args:
        linears: without biases, in bfloat16.
        matvecs: the products.
    """

    def __init__(self, linears: Sequence[nn.Linear], matvecs: Matvecs) -> None:
        self._linears, self._matvecs = linears, matvecs
        self._partners: dict[int, set[int]] = defaultdict(set)
        self._round: _Round | None = None

    def __call__(self, number: int, otherwise: Callable[[torch.Tensor], torch.Tensor], x: Any) -> Any:
        """What the linear layer of this number gives for `x`; `otherwise` for anything but a single token."""
        linear, latest = self._linears[number], self._round
        learns = torch.is_grad_enabled() and (x.requires_grad or linear.weight.requires_grad)
        if x.numel() != linear.in_features or x.dtype != torch.bfloat16 or x.device.type != "cpu" or learns:
            return otherwise(x)
        if latest is not None and latest.x.shape == x.shape and torch.equal(latest.x, x):
            if (found := latest.ready.pop(number, None)) is not None:
                return found
            self._partners[latest.leader].add(number)
            numbers = [number]
        else:
            if latest is not None:
                self._partners[latest.leader] -= latest.ready.keys()
            latest = self._round = _Round(number, x.clone(), {})
            numbers = [number, *sorted(self._partners[number] - {number})]
        outs = self._multiply(numbers, x) or self._multiply([number], x)
        if not outs:
            return otherwise(x)
        latest.ready.update(zip(numbers[1:], outs[1:], strict=False))
        return outs[0]

    def _multiply(self, numbers: Sequence[int], x: torch.Tensor) -> list[torch.Tensor]:
        """The results, or none if no kernel fits all."""
        linears = [self._linears[number] for number in numbers]
        outs = [x.new_empty(*x.shape[:-1], linear.out_features) for linear in linears]
        return outs if self._matvecs.multiply(x, [linear.weight for linear in linears], outs) else []
