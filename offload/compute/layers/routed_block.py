"""A feed-forward that is nothing but a router and its experts: left out for single tokens, as a trial allows.

Our C chooses the experts, and whoever holds them computes their sum. The module's own code and the router's would take
several times as long as the choice.

Shapes: K experts per token, D model width.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .choice import Operations, find_choice
from .structs import Choice
from .token_room import TokenRoom

PLACE = "_expertier_place"
"""Attribute of an experts module that offloading computes: who does, and the number of the layer there."""


@dataclass(frozen=True, eq=False)
class RoutedBlock:
    """What stands for a feed-forward.

    Args:
        block: the feed-forward.
        router: its router.
        experts: its experts, with a `PLACE`.
        how: how the router chooses.
        forward: what computes the experts, where it was prepared.
    """

    block: Any
    router: Any
    experts: Any
    how: Choice
    forward: Any

    @property
    def is_usable(self) -> bool:
        """Whether nobody listens to the modules that would not be called, or has replaced what they do."""
        block, router = self.block, self.router
        listeners = (block._forward_hooks, block._forward_pre_hooks, router._forward_hooks, router._forward_pre_hooks)
        if any(listeners) or "forward" in vars(block) or "forward" in vars(router):
            return False
        is_same = vars(self.experts).get("forward") is self.forward
        return is_same and router in block._modules.values() and self.experts in block._modules.values()

    @property
    def weight_type(self) -> torch.dtype:
        return torch.bfloat16 if self.how.is_rounded else torch.float32

    @property
    def has_listeners(self) -> bool:
        """Whether somebody may keep what the experts are given."""
        experts = self.experts
        return bool(experts._forward_hooks or experts._forward_pre_hooks) or vars(experts)[PLACE][0].listens

    def step(self) -> Any:
        """What computes the experts where nobody listens, if it is known already."""
        runtime, layer = vars(self.experts)[PLACE]
        return runtime.token_step(layer, self.experts, self.how.chosen, self.weight_type)

    def compute(self, step: Any, room: TokenRoom, out_11D: torch.Tensor) -> None:
        """Write what the layer gives where nobody listens: what the chosen experts make of the token, added to the sum.

        Args:
            step: from `step`.
            room: with the token and its choice.
            out_11D: contiguous; written.
        """
        runtime, layer = vars(self.experts)[PLACE]
        chosen = (room.expert_1K, room.weight_1K)
        runtime.forward_token(step, layer, self.experts, room.normed_1D, *chosen, room.sum_11D, out_11D)

    def by_module(self, room: TokenRoom, out_11D: torch.Tensor) -> None:
        """The same by the experts' module, whose listeners may keep what they are given."""
        given = (each.clone() for each in (room.normed_1D, room.expert_1K, room.weight_1K))
        torch.add(room.sum_11D, self.experts(*given), out=out_11D)


@torch.inference_mode(False)  # as for `find_choice`
@torch.no_grad()
def find_routed_block(block: Any, router: Any, model_width: int) -> RoutedBlock | None:
    """What may stand for a feed-forward; None if it does more than its router and experts, or those are not known.

    Args:
        block: the feed-forward.
        router: its router, whose weight is a `TokenWeight`.
        model_width: D, of the token that it is tried on.
    """
    experts = [(name, module) for name, module in block.named_children() if hasattr(module, PLACE)]
    if router is None or len(experts) != 1 or "forward" in vars(block) or block.training:
        return None
    name, module = experts[0]
    how = find_choice(router)
    if how is None or not _adds_nothing(block, router, name, how, model_width):
        return None
    return RoutedBlock(block, router, module, how, vars(module).get("forward"))


class _Experts(nn.Module):
    """Stands for experts, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[torch.Tensor] = []

    def forward(self, x_1D: torch.Tensor, expert_1K: torch.Tensor, weight_1K: torch.Tensor) -> torch.Tensor:
        self.given += [x_1D, expert_1K, weight_1K]
        return x_1D.flip(-1)


def _adds_nothing(block: Any, router: Any, experts: str, how: Choice, model_width: int) -> bool:
    """Whether a block gives its experts the token and its router's choice, returns what they make of them, and calls no
    operation besides."""
    twin, stand_in = copy.copy(block), _Experts()
    twin._modules = {**block._modules, experts: stand_in}
    generator = torch.Generator().manual_seed(0)
    x_11D = torch.randn(1, 1, model_width, generator=generator).bfloat16()
    try:
        router(x_11D[0])  # a first product may be tried
        with Operations() as of_router:
            _, weight_1K, expert_1K = router(x_11D[0])
        with Operations() as of_block:
            found = twin(x_11D)
    except Exception:  # of a block that is something else, which fails in its own way
        return False
    result = found[0] if isinstance(found, tuple) else found
    expected = (x_11D[0], expert_1K, weight_1K)
    is_given = len(stand_in.given) == len(expected) and all(map(_are_equal, stand_in.given, expected))
    is_all = of_block.names == [*of_router.names, "flip"] and expert_1K.shape[1] == how.chosen
    return is_given and is_all and _are_equal(result, x_11D.flip(-1))


def _are_equal(one: Any, other: torch.Tensor) -> bool:
    is_alike = isinstance(one, torch.Tensor) and (one.shape, one.dtype) == (other.shape, other.dtype)
    return is_alike and torch.equal(one, other)
