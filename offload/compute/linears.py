"""Resident linear layers on single tokens: our products where they have the bits, siblings of one input together.

Routers and the like hold a matrix and call `torch.nn.functional.linear` themselves; their weights see to it.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe import Linear

from .matvec import Matvecs, is_in_memory

# what they compute is known from the type alone
PLAIN_LINEARS = (nn.Linear, Linear)


def quicken_linears(model: nn.Module, matvecs: Matvecs) -> None:
    """Let the resident bfloat16 linear layers of a model multiply single tokens by `matvecs`."""
    for module in model.modules():
        weight = module._parameters.get("weight")
        is_other = not isinstance(module, nn.Linear | nn.Embedding) and weight is not None
        if is_other and weight.dim() == 2 and weight.dtype == torch.bfloat16 and weight.device.type == "cpu":
            module.weight = TokenWeight(weight.data, matvecs)
    for parent in list(model.modules()):
        siblings = defaultdict(list)
        for child in parent.children():
            if type(child) in PLAIN_LINEARS and child.weight.dtype == torch.bfloat16 and child.bias is None:
                siblings[child.in_features].append(child)
        for linears in siblings.values():
            group = SiblingLinears(linears, matvecs)
            for number, linear in enumerate(linears):
                linear.forward = TokenLinear(group, number, linear.forward).forward  # type: ignore[method-assign]


class TokenWeight(nn.Parameter):
    """A matrix that single tokens are multiplied with by `matvecs` when `linear` is called with it.

    Args:
        weight_FD: the matrix.
        matvecs: the products.
    """

    matvecs: Matvecs

    def __new__(cls, weight_FD: torch.Tensor, matvecs: Matvecs) -> "TokenWeight":
        weight: TokenWeight = torch.Tensor._make_subclass(cls, weight_FD, False)
        weight.matvecs = matvecs
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is nn.functional.linear and len(args) == 2 and not kwargs and isinstance(args[1], TokenWeight):
                x, weight_FD = args
                is_token = isinstance(x, torch.Tensor) and x.numel() == weight_FD.shape[1] and not x.requires_grad
                if is_token and not torch.compiler.is_compiling():
                    out = x.new_empty(*x.shape[:-1], len(weight_FD))
                    if weight_FD.matvecs.multiply(x, (weight_FD.data,), (out,)):
                        return out
            return func(*args, **(kwargs or {}))

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenWeight":
        return TokenWeight(self.data.clone(), self.matvecs)


@dataclass(eq=False)
class _Round:
    """One input, who asked first, and what was computed besides and not asked for yet."""

    leader: int
    x: torch.Tensor
    ready: dict[int, torch.Tensor]


@dataclass(eq=False)
class TokenLinear:
    """The forward pass of one linear layer of a group; a method, so that a copied model has copies of its own."""

    group: "SiblingLinears"
    number: int
    otherwise: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002  torch.nn.Linear calls it so
        """What the layer computes; anything but a single token in memory by torch."""
        if torch.compiler.is_compiling() or not is_in_memory(input):
            return self.otherwise(input)
        found: torch.Tensor = self.group(self.number, self.otherwise, input)
        return found


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
        if x.numel() != linear.in_features or x.dtype != torch.bfloat16 or learns:
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
