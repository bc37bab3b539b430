"""Resident linear layers on single tokens: our products where bit-identical to torch's, siblings of one input together.

Routers and the like hold a matrix and call `torch.nn.functional.linear` themselves; their weights see to it.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from ..formats.resident.linears import PLAIN_LINEARS
from ..native.library import NUMBER, POINTER, c_function
from .matvec import Matvecs, is_in_memory

CONVERTED = (torch.float32,)
"""The argument of a conversion to float32."""


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
            if type(child) in PLAIN_LINEARS and child.weight.dtype == torch.bfloat16:
                siblings[child.in_features].append(child)
        for linears in siblings.values():
            group = SiblingLinears(linears, matvecs)
            for number, linear in enumerate(linears):
                linear.forward = TokenLinear(group, number, linear.forward).forward  # type: ignore[method-assign]


class TokenWeight(nn.Parameter):
    """A matrix `weight_FD` that `matvecs` multiplies single tokens with when `linear` is called with it.

    Everything else that is done with it, torch does.
    """

    matvecs: Matvecs
    known_of: tuple[int, torch.Tensor] | None = None
    """Address of an input whose product is known, and the product."""

    def __new__(cls, weight_FD: torch.Tensor, matvecs: Matvecs) -> "TokenWeight":
        weight: TokenWeight = torch.Tensor._make_subclass(cls, weight_FD, False)
        weight.matvecs = matvecs
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is nn.functional.linear and len(args) in (2, 3) and not kwargs and isinstance(args[1], TokenWeight):
                x, weight_FD, bias_F = *args, *([None] * (3 - len(args)))
                is_usable = isinstance(x, torch.Tensor) and x.shape[-1:] == weight_FD.shape[1:] and not x.requires_grad
                if is_usable and not torch.compiler.is_compiling():
                    if (known := weight_FD.known_of) is not None and known[0] == x.data_ptr():
                        return known[1].view(*x.shape[:-1], len(weight_FD))
                    out = x.new_empty(*x.shape[:-1], len(weight_FD))
                    if weight_FD.matvecs.multiply(x, (weight_FD.data,), (out,), (bias_F,)):
                        return out
            if _widens(func, args, kwargs) and args[0].matvecs.multiplies_wide(1):
                return WideWeight(args[0].data, args[0].matvecs)
            return func(*args, **(kwargs or {}))

    @contextmanager
    def known(self, x: torch.Tensor, product: torch.Tensor) -> Iterator[None]:
        """Within, the product of this very `x` with the matrix, bias included, is not computed again.

        Args:
            x: one row, which nobody writes to within.
            product: its product.
        """
        self.known_of = (x.data_ptr(), product)
        try:
            yield
        finally:
            self.known_of = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "TokenWeight":
        return TokenWeight(self.data.clone(), self.matvecs)


def _widens(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> bool:
    """Whether a `TokenWeight` in memory is converted to float32."""
    is_asked = func is torch.Tensor.float or (func in (torch.Tensor.to, torch.Tensor.type) and args[1:] == CONVERTED)
    is_plain = is_asked and not kwargs and isinstance(args[0], TokenWeight) and not torch.compiler.is_compiling()
    return is_plain and is_in_memory(args[0].data) and args[0].is_contiguous()


class WideWeight(torch.Tensor):
    """A bfloat16 matrix that stands for itself in float32, as routers ask for with every token.

    Products with it are computed by our C, which widens it row by row, in an order that does not depend on the number
    of tokens. For everything else it is converted.
    """

    narrow_FD: torch.Tensor
    matvecs: Matvecs

    def __new__(cls, weight_FD: torch.Tensor, matvecs: Matvecs) -> "WideWeight":
        wide: WideWeight = torch.Tensor._make_subclass(cls, weight_FD, False)
        wide.narrow_FD, wide.matvecs = weight_FD, matvecs
        return wide

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            is_product = func is nn.functional.linear and len(args) in (2, 3) and not kwargs and type(args[1]) is cls
            is_plain = is_product and (len(args) == 2 or args[2] is None)
            if is_plain and (out := args[1]._multiplied(args[0])) is not None:
                return out
            args, kwargs = tree_map_only(cls, lambda wide: wide.narrow_FD.float(), (tuple(args), kwargs or {}))
            return func(*args, **kwargs)

    def _multiplied(self, x: torch.Tensor) -> torch.Tensor | None:
        """`x @ weight.t()`; None if torch is to compute it."""
        weight_FD, columns = self.narrow_FD, self.narrow_FD.shape[1]
        if not is_in_memory(x) or x.dtype != torch.float32 or x.shape[-1] != columns or not x.is_contiguous():
            return None
        rows = x.numel() // columns
        if not self.matvecs.multiplies_wide(rows) or (torch.is_grad_enabled() and x.requires_grad):
            return None
        out = x.new_empty(*x.shape[:-1], len(weight_FD))
        _multiply_wide()(x.data_ptr(), rows, weight_FD.data_ptr(), *weight_FD.shape, out.data_ptr())
        return out


@functools.cache
def _multiply_wide() -> Any:
    """`expertier_multiply_wide`."""
    return c_function("expertier_multiply_wide", POINTER, NUMBER, POINTER, NUMBER, NUMBER, POINTER)


def plain_weight(weight: torch.Tensor) -> torch.Tensor:
    """The matrix of a `TokenWeight` as any tensor; others as they are."""
    with torch._C.DisableTorchFunctionSubclass():
        return weight.data if isinstance(weight, TokenWeight) else weight


@dataclass(eq=False)
class _Round:
    """One input of a group, from the layer that asks with it first (the leader) to the next input."""

    leader: int
    x: torch.Tensor
    """A copy: the caller may write its next token into the same memory."""
    ready: dict[int, torch.Tensor]
    """What was computed with the leader and is not asked for yet."""

    def has(self, x: torch.Tensor) -> bool:
        """Whether these are the round's own numbers."""
        return self.x.shape == x.shape and torch.equal(self.x, x)


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
        return self.group(self.number, self.otherwise, input)


class SiblingLinears:
    """Linear layers of one module and one input width, which learns which of them share an input.

    A layer that asks with a new input leads a round. Layers that ask with the same input follow it; the leader learns
    them, and computes them with itself in its next round. An example, with queries, keys and values:

        token 1   q asks   new input: q leads a round          q is computed
                  k asks   same input, not ready: q learns k   k is computed
                  v asks   same input, not ready: q learns v   v is computed
        token 2   q asks   new input: q leads a round          q, k and v are computed together
                  k asks   same input, ready                   nothing is computed
                  v asks   same input, ready                   nothing is computed

    A follower that is ready and not asked for before the next input is unlearnt.

    Args:
        linears: in bfloat16, all of one input width.
        matvecs: chooses the kernel; where it has none, each layer computes itself.
    """

    def __init__(self, linears: Sequence[nn.Linear], matvecs: Matvecs) -> None:
        self._linears, self._matvecs = linears, matvecs
        self._followers: dict[int, set[int]] = defaultdict(set)
        self._round: _Round | None = None

    def __call__(self, number: int, otherwise: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """What the linear layer of this number gives for `x`; `otherwise` for anything but a single token."""
        if not self._may_multiply(self._linears[number], x):
            return otherwise(x)
        # read once: another thread may begin a round between two looks
        current = self._round
        found = self._follow(current, number, x) if current is not None and current.has(x) else self._lead(number, x)
        return otherwise(x) if found is None else found

    def _may_multiply(self, linear: nn.Linear, x: torch.Tensor) -> bool:
        needs_gradient = torch.is_grad_enabled() and (x.requires_grad or linear.weight.requires_grad)
        if needs_gradient or not x.numel() or x.dtype != torch.bfloat16 or x.shape[-1:] != (linear.in_features,):
            return False
        return self._matvecs.accepts(x.numel() // linear.in_features)

    def _lead(self, number: int, x: torch.Tensor) -> torch.Tensor | None:
        """A new input: this layer, and the followers of its latest round with it."""
        if self._round is not None:
            self._followers[self._round.leader] -= self._round.ready.keys()
        current = self._round = _Round(number, x.clone(), {})
        followers = sorted(self._followers[number])
        if followers and (outs := self._multiply([number, *followers], x)):
            current.ready.update(zip(followers, outs[1:], strict=True))
            return outs[0]
        return self._alone(number, x)

    def _follow(self, current: _Round, number: int, x: torch.Tensor) -> torch.Tensor | None:
        """The round's input again."""
        # one operation: another thread may ask with the same numbers at the same time
        if (found := current.ready.pop(number, None)) is not None:
            return found
        if number != current.leader:
            self._followers[current.leader].add(number)
        return self._alone(number, x)

    def _alone(self, number: int, x: torch.Tensor) -> torch.Tensor | None:
        return next(iter(self._multiply([number], x)), None)

    def _multiply(self, numbers: Sequence[int], x: torch.Tensor) -> list[torch.Tensor]:
        """The results; none if no single kernel fits all."""
        linears = [self._linears[number] for number in numbers]
        outs = [x.new_empty(*x.shape[:-1], linear.out_features) for linear in linears]
        weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
        return outs if self._matvecs.multiply(x, weights, outs, biases) else []
