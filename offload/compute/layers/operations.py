"""What a feed-forward calls for one token, where its logits, and what other modules make of the token, are given.

Shapes: E experts, K experts per token, D model width.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..linears import plain_weight

VIEWS = frozenset({"view", "_unsafe_view", "alias", "detach", "squeeze", "unsqueeze", "slice", "select", "expand"})
"""Operations that compute nothing."""


class Call(NamedTuple):
    """One operation of torch."""

    name: str
    args: tuple[Any, ...]
    options: Mapping[str, Any]
    made: Any


class Operations(TorchDispatchMode):
    """Within, torch's operations are noted, but for views. What they read and made is kept, so that addresses say
    what is made of what."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if (name := func.overloadpacket.__name__) not in VIEWS:
            self.calls.append(Call(name, args, kwargs or {}, made))
        return made


class GivenLogits(TorchFunctionMode):
    """Within, products with a router's matrix are given.

    Args:
        weight_ED: the router's.
        logit_1E: what the product of the token with it, and the bias, is to be; in the type that is asked for.
        operations: notes the product as a call `linear`.
    """

    def __init__(self, weight_ED: torch.Tensor, logit_1E: torch.Tensor, operations: Operations) -> None:
        super().__init__()
        self._shape, self._logit_1E, self._operations = weight_ED.shape, logit_1E, operations

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and args[1].shape == self._shape:
            x = args[0]
            logits = self._logit_1E.to(x.dtype).clone()
            self._operations.calls.append(Call("linear", args, kwargs or {}, logits))
            return logits.view(*x.shape[:-1], -1)
        return func(*args, **(kwargs or {}))


class StandIn(nn.Module):
    """Stands for a module, keeps what it is given, and gives the same numbers to everybody.

    Args:
        name: of the call that is noted.
        made_1n: what it gives.
    """

    def __init__(self, name: str, made_1n: torch.Tensor) -> None:
        super().__init__()
        self._name, self.made_1n = name, made_1n
        self.operations: Operations | None = None

    def forward(self, *args: Any) -> torch.Tensor:
        assert self.operations is not None
        self.operations.calls.append(Call(self._name, args, {}, self.made_1n))
        return self.made_1n.view(*args[0].shape[:-1], -1)


class _Linear(nn.Module):
    """A linear layer whose product torch is asked for."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class Answer:
    """What a feed-forward made of given logits.

    Args:
        product: the router's product.
        choice: what was called between the product and the experts.
        given: what the experts were given: the token, ids and weights.
        after: what was called afterwards.
        shared: calls of other modules.
        result: of the feed-forward.
        is_alone: whether nothing is given besides.
    """

    product: Call
    choice: list[Call]
    given: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    after: list[Call]
    shared: list[Call]
    result: torch.Tensor
    is_alone: bool

    @property
    def chosen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and weights, `[1, K]`."""
        return self.given[1], self.given[2]


def _first(given_back: Any) -> Any:
    """What a feed-forward gives that may give a router's logits besides."""
    return given_back[0] if isinstance(given_back, tuple) else given_back


def _plain_copy(module: Any) -> Any:
    """The same module by its class's own forward pass."""
    copied = copy.copy(module)
    vars(copied).pop("forward", None)
    return copied


EXPERTS, SHARED = "experts", "shared"


class Questioned:
    """A feed-forward whose experts and shared experts are replaced, so that no expert is read.

    Args:
        block: a feed-forward.
        experts: name of its experts.
        router: its router.
        weight_ED: the router's matrix.
    """

    def __init__(self, block: nn.Module, experts: str, router: nn.Module, weight_ED: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        width, self._weight_ED = weight_ED.shape[1], weight_ED
        self.x_11D = torch.randn(1, 1, width, generator=generator).bfloat16()
        self._twin, self._ended, self._stand_ins = _plain_copy(block), _plain_copy(block), dict[str, StandIn]()
        for name, module in block.named_children():
            if module is not router:
                of = module.out_features if isinstance(module, nn.Linear) else width
                made_1n = torch.randn(1, of, generator=generator).bfloat16()
                self._stand_ins[name] = StandIn(EXPERTS if name == experts else SHARED, made_1n)
        self.others = [name for name in self._stand_ins if name != experts]
        self.routed_1D = self._stand_ins[experts].made_1n
        self._ended._modules = {**block._modules, experts: self._stand_ins[experts]}
        self._twin._modules = {name: self._replaced(name, module, router) for name, module in block._modules.items()}

    @property
    def num_experts(self) -> int:
        return self._weight_ED.shape[0]

    def _replaced(self, name: str, module: Any, router: nn.Module) -> Any:
        if module is not router:
            return self._stand_ins.get(name)
        twin = copy.copy(router)
        linears = {name: _Linear(child) for name, child in router.named_children() if isinstance(child, nn.Linear)}
        twin._modules = {**router._modules, **linears}
        return twin

    def made(self, name: str) -> torch.Tensor:
        """What stands for the output of a module."""
        return self._stand_ins[name].made_1n

    def answer(self, logit_1E: torch.Tensor) -> Answer | None:
        """What the feed-forward does with these logits; None if it is not of the form that `Answer` has."""
        operations = Operations()
        for stand_in in self._stand_ins.values():
            stand_in.operations = operations
        try:
            given = GivenLogits(self._weight_ED, logit_1E, operations)
            with torch.inference_mode(False), torch.no_grad(), operations, given:
                given_back = self._twin(self.x_11D)
        except Exception:  # of a block that is something else, which fails in its own way
            return None
        shared = [call for call in operations.calls if call.name == SHARED]
        calls = [call for call in operations.calls if call.name != SHARED]
        names, result = [call.name for call in calls], _first(given_back)
        if names.count("linear") != 1 or names.count(EXPERTS) != 1 or not isinstance(result, torch.Tensor):
            return None
        at, end = names.index("linear"), names.index(EXPERTS)
        handed = calls[end].args
        if at > end or len(handed) != 3 or not self._is_router_product(calls[at]):
            return None
        if not all(torch.equal(call.args[0].view(1, -1), self.x_11D[0]) for call in (calls[end], *shared)):
            return None
        return Answer(calls[at], calls[at + 1 : end], handed, calls[end + 1 :], shared, result, result is given_back)

    def ended(self, x_11D: torch.Tensor) -> torch.Tensor | None:
        """What the feed-forward gives for a token, where only its experts are replaced; None if it fails."""
        for stand_in in self._stand_ins.values():
            stand_in.operations = Operations()
        try:
            found = _first(self._ended(x_11D))
        except Exception:  # as above
            return None
        return found if isinstance(found, torch.Tensor) else None

    def _is_router_product(self, call: Call) -> bool:
        """Whether a product is that of the token with the router's matrix, both as they are."""
        x, weight = call.args[0].view(1, -1), call.args[1]
        is_token = torch.equal(x.float(), self.x_11D[0].float())
        known = plain_weight(self._weight_ED)
        is_itself = plain_weight(weight).data_ptr() == known.data_ptr()
        return is_token and (is_itself or torch.equal(plain_weight(weight).float(), known.float()))
