"""A feed-forward that is a router and its experts, with a shared expert or none: left out for single tokens.

Our C chooses the experts, and whoever holds them computes what the feed-forward gives. The module's own code and the
router's would take several times as long as the choice.

Shapes: E experts, K experts per token, D model width.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..linears import TokenWeight, plain_weight
from ..matvec import Matvecs, is_in_memory
from .choice import find_choice
from .ending import Ending, find_ending
from .held import Held
from .operations import Call, Questioned
from .parts import ROUTERS
from .structs import Choice, Router, Siblings, choose_experts, route, siblings_struct
from .token_room import TokenRoom

PLACE = "_expertier_place"
"""Attribute of an experts module that offloading computes: who does, and the number of the layer there."""


@dataclass(frozen=True, eq=False)
class RouterProduct:
    """Where a router's logits come from: our C, or torch, which computes them as the module asks.

    Args:
        weight_ED, bias_E: the router's.
        is_wide: whether token and weight are converted to float32 first.
        siblings: a bfloat16 product as C takes it; None if that is torch's.
        wide: address of the weight of a float32 product that C computes; or None.
    """

    weight_ED: torch.Tensor
    bias_E: torch.Tensor | None
    is_wide: bool
    siblings: Siblings | None
    wide: int | None

    @property
    def is_ours(self) -> bool:
        """Whether our C computes it."""
        return self.siblings is not None or self.wide is not None

    def by_torch(self, x_1D: torch.Tensor) -> torch.Tensor:
        """The logits of a token, `[1, E]`."""
        weight_ED = self.weight_ED
        if self.is_wide:
            x_1D, weight_ED = x_1D.float(), plain_weight(weight_ED).float()
        return nn.functional.linear(x_1D, weight_ED, self.bias_E)


class RoutedBlock:
    """What stands for a feed-forward.

    Args:
        block: the feed-forward.
        experts: its experts, with a `PLACE`.
        how: how its router chooses.
        product: the router's.
        ending: what becomes of the experts' sum.
        held: modules and weights that C was told of.
        keeps_shape: whether the block gives numbers of the shape of those that it is given, and nothing else.
    """

    def __init__(
        self,
        block: Any,
        experts: Any,
        how: Choice,
        product: RouterProduct,
        ending: Ending,
        held: Held,
        *,
        keeps_shape: bool,
    ) -> None:
        self.how, self.product, self.keeps_shape = how, product, keeps_shape
        self._block, self._experts, self._ending, self._held = block, experts, ending, held
        self._forward = vars(experts).get("forward")
        self.router = Router(product.siblings or Siblings(), product.wide, self.width, how)

    @property
    def is_usable(self) -> bool:
        """Whether nobody listens to modules of the block that would not be called, or has replaced what they are."""
        held = self._held
        is_same = vars(self._experts).get("forward") is self._forward
        return is_same and not held.has_listeners and not held.wants_gradient and held.is_current

    @property
    def is_itself(self) -> bool:
        """Whether nobody listens to the block as a whole, or has replaced what it computes."""
        block = self._block
        return not (block._forward_hooks or block._forward_pre_hooks) and "forward" not in vars(block)

    @property
    def width(self) -> int:
        """D, of the token."""
        return self.product.weight_ED.shape[1]

    @property
    def weight_type(self) -> torch.dtype:
        return torch.bfloat16 if self.how.is_rounded else torch.float32

    @property
    def has_listeners(self) -> bool:
        """Whether somebody may keep what the experts are given."""
        experts = self._experts
        return bool(experts._forward_hooks or experts._forward_pre_hooks) or vars(experts)[PLACE][0].listens

    def step(self) -> Any:
        """What computes the experts where nobody listens, if it is known already."""
        runtime, layer = vars(self._experts)[PLACE]
        return runtime.token_step(layer, self._experts, self.how.chosen, self.weight_type)

    def choose(self, x_1D: torch.Tensor, room: TokenRoom) -> bool:
        """Whether experts were chosen for a token; their ids and weights are in the room then.

        Args:
            x_1D: hidden numbers, contiguous and bfloat16.
            room: for the choice.
        """
        if self.product.is_ours:
            return bool(route()(self.router, x_1D.data_ptr(), room.logits, room.expert, room.weight))
        logit_1E = self.product.by_torch(x_1D)
        return bool(choose_experts()(self.how, logit_1E.data_ptr(), room.expert, room.weight))

    def compute(
        self, step: Any, x_1D: torch.Tensor, room: TokenRoom, added_to: torch.Tensor | None, out: torch.Tensor
    ) -> None:
        """Write what the feed-forward gives where nobody listens.

        Args:
            step: from `step`.
            x_1D: hidden numbers, contiguous and bfloat16.
            room: with the token's choice.
            added_to: D numbers that the result is added to; or None.
            out: contiguous; written.
        """
        runtime, layer = vars(self._experts)[PLACE]
        chosen = (room.expert_1K, room.weight_1K)
        runtime.forward_token(step, layer, self._experts, x_1D, *chosen, self._ending.of(x_1D), added_to, out)

    def by_module(self, x_1D: torch.Tensor, room: TokenRoom, added_to: torch.Tensor | None, out: torch.Tensor) -> None:
        """The same with the experts computed by their module, whose listeners may keep what they are given."""
        made_1D = self._experts(*(each.clone() for each in (x_1D, room.expert_1K, room.weight_1K)))
        self._ending.of(x_1D).finish(made_1D, x_1D.data_ptr(), None if added_to is None else added_to.data_ptr(), out)


@torch.inference_mode(False)  # within it, operations are not called by the names of what they are made of
@torch.no_grad()
def find_routed_block(block: Any, matvecs: Matvecs) -> RoutedBlock | None:
    """What may stand for a feed-forward; None if it does something else, or its experts are not offloaded.

    Args:
        block: the feed-forward.
        matvecs: chooses orders of summation.
    """
    experts = [name for name, module in block.named_children() if hasattr(module, PLACE)]
    if len(experts) != 1 or block.training or (found := find_router(block)) is None:
        return None
    router, weight_ED = found
    questioned = Questioned(block, experts[0], router, weight_ED)
    if (chosen := find_choice(questioned)) is None:
        return None
    how, bias_E, answer = chosen
    if (ending := find_ending(block, questioned, answer, matvecs)) is None:
        return None
    product = _product(answer.product, weight_ED, matvecs)
    others = [each for name, child in block.named_children() if name != experts[0] for each in child.modules()]
    read = [each for each in (weight_ED, product.bias_E, bias_E) if each is not None]
    if (weights := _places([block, *others], read)) is None:
        return None
    keeps_shape = answer.is_alone and answer.result.shape == questioned.x_11D.shape
    held = Held([block, *others], [*weights, *ending.weights], others)
    return RoutedBlock(block, block.get_submodule(experts[0]), how, product, ending, held, keeps_shape=keeps_shape)


def _product(called: Call, weight_ED: torch.Tensor, matvecs: Matvecs) -> RouterProduct:
    """The router's product as it was called, and as C takes it where our order of summation is what was promised."""
    bias_E, is_wide = called.args[2] if len(called.args) > 2 else None, called.made.dtype == torch.float32
    plain_ED = plain_weight(weight_ED)
    order = None if is_wide else matvecs.common_order([plain_ED], [bias_E])
    siblings = None if order is None else siblings_struct(order, [plain_ED], [bias_E])
    is_widened = is_wide and bias_E is None and isinstance(weight_ED, TokenWeight) and plain_ED.is_contiguous()
    wide = plain_ED.data_ptr() if is_widened and matvecs.multiplies_wide(1) else None
    return RouterProduct(weight_ED, bias_E, is_wide, siblings, wide)


def _places(modules: Iterable[nn.Module], read: Sequence[torch.Tensor]) -> list[tuple[nn.Module, str]] | None:
    """Which parameters and buffers of some modules these are; None if one is none of theirs."""
    addresses = {plain_weight(tensor).data_ptr() for tensor in read}
    found = {
        plain_weight(tensor).data_ptr(): (module, name)
        for module in modules
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None and plain_weight(tensor).data_ptr() in addresses
    }
    return list(found.values()) if found.keys() == addresses else None


def find_router(block: nn.Module) -> tuple[nn.Module, torch.Tensor] | None:
    """A feed-forward's router and its only matrix, in memory; None without one."""
    routers = [module for name, module in block.named_children() if name in ROUTERS]
    matrices = [weight for module in routers for weight in module.parameters() if weight.dim() == 2 and len(weight) > 1]
    if len(routers) != 1 or len(matrices) != 1 or not is_in_memory(plain_weight(matrices[0])):
        return None
    return routers[0], matrices[0]
