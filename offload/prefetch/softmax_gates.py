"""The gates of a model whose routers are a softmax over a linear map, for any family: found beside the experts, tried.

Shapes: T tokens, K experts per token, E experts, D model width.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from routing import Carry, ClassicRouter, RouterModule, Routing, RoutingContext

from ..checkpoint.experts import experts_modules

TRIED_TOKENS = 32
"""Random tokens that a gate is tried with; each is a check of its own."""
TOLERANCE = 2e-2
"""Relative difference of weights that the rounding of bfloat16 leaves."""


@dataclass(frozen=True, eq=False)
class SoftmaxGate:
    """One layer's router: probabilities are a softmax of `weight x`, the K largest choose.

    Args:
        router: the module, whose call gives ids and weights.
        experts: the experts module beside it.
        is_renormalised: whether a token's weights are divided by their sum.
        scale: factor of the weights.
    """

    router: nn.Module
    experts: nn.Module
    is_renormalised: bool = False
    scale: float = 1.0

    @property
    def weight_ED(self) -> nn.Parameter:
        """The one matrix of the gate."""
        (weight,) = [p for p in self.router.parameters(recurse=False) if p.ndim == 2]
        return weight

    def logits(self, x: torch.Tensor, weight_ED: torch.Tensor | None = None) -> torch.Tensor:
        """[T, E] in float32, of inputs [..., D]; with another matrix if one is given."""
        weight_ED = self.weight_ED if weight_ED is None else weight_ED
        return linear(x.reshape(-1, x.shape[-1]).float(), weight_ED.float())

    def weights(self, logit_TE: torch.Tensor, expert_TK: torch.Tensor) -> torch.Tensor:
        """[T, K] float32: what the router would weigh these experts with."""
        weight_TK = logit_TE.softmax(dim=-1).gather(-1, expert_TK)
        if self.is_renormalised:
            weight_TK = weight_TK / weight_TK.sum(dim=-1, keepdim=True)
        return weight_TK * self.scale


def softmax_gates(model: nn.Module) -> list[SoftmaxGate]:
    """One per layer of experts, in order; each was tried on random tokens against its own module.

    Raises:
        ValueError: if a router is of another kind: recurrent, with groups, a balancing bias or other scores.
    """
    found = []
    for name, experts in experts_modules(model).items():
        parent = model.get_submodule(name.rpartition(".")[0])
        routers = [child for child in parent.children() if child is not experts and _has_one_matrix(child, experts)]
        tried = _tried(routers[0], experts) if len(routers) == 1 else None
        if tried is None:
            kinds = ", ".join(type(router).__name__ for router in routers) or "none"
            raise ValueError(
                f"the router beside {name} must be a softmax over one matrix, which chooses the K largest; "
                f"found {kinds}, which is not"
            )
        found.append(tried)
    if not found:
        raise ValueError(f"{type(model).__name__} has no experts, so it has no gates")
    return found


def chosen(result: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights `[T, K]` of what a router's call gave, ours or transformers'."""
    if isinstance(result[0], Routing):
        return result[0].expert_TK, result[0].weight_TK
    _, weight_TK, expert_TK = result
    return expert_TK, weight_TK


def with_choice(result: Any, expert_TK: torch.Tensor, weight_TK: torch.Tensor) -> Any:
    """The same result with another choice."""
    before_TK = chosen(result)[1]
    if isinstance(result[0], Routing):
        routing = replace(result[0], expert_TK=expert_TK, weight_TK=weight_TK.to(before_TK.dtype))
        return (routing, *result[1:])
    return (result[0], weight_TK.to(before_TK.dtype), expert_TK)


def _has_one_matrix(child: nn.Module, experts: Any) -> bool:
    own = [p for p in child.parameters() if p.ndim == 2]
    return len(own) == 1 and own[0].shape[0] == experts.num_experts and not list(child.children())


@torch.no_grad()
def _tried(router: nn.Module, experts: nn.Module) -> SoftmaxGate | None:
    """The gate, if a softmax gives the router's own choices and weights, as they are or divided by their sum."""
    if isinstance(router, RouterModule) and type(router) is not ClassicRouter:
        return None
    gate, generator = SoftmaxGate(router, experts), torch.Generator().manual_seed(0)
    x_TD = torch.randn(TRIED_TOKENS, gate.weight_ED.shape[1], generator=generator).to(gate.weight_ED)
    try:
        expert_TK, weight_TK = chosen(_ask(router, x_TD))
    except (TypeError, ValueError):  # it wants more than hidden states, or gives something else
        return None
    for is_renormalised in (False, True):
        plain_TK = replace(gate, is_renormalised=is_renormalised).weights(gate.logits(x_TD), expert_TK)
        scale = float((weight_TK.float() / plain_TK).median())
        if _is_close(weight_TK, plain_TK * scale) and _are_largest(gate.logits(x_TD), expert_TK):
            return replace(gate, is_renormalised=is_renormalised, scale=scale)
    return None


def _ask(router: nn.Module, x_TD: torch.Tensor) -> Any:
    if isinstance(router, ClassicRouter):
        return router(x_TD, Carry(), RoutingContext())
    return router(x_TD)


def _is_close(weight_TK: torch.Tensor, expected_TK: torch.Tensor) -> bool:
    return bool(((weight_TK.float() - expected_TK).abs() <= TOLERANCE * expected_TK).all())


def _are_largest(logit_TE: torch.Tensor, expert_TK: torch.Tensor) -> bool:
    """Whether no other expert has a logit that is larger by more than rounding."""
    least_T = logit_TE.gather(1, expert_TK).amin(dim=1)
    others_T = logit_TE.scatter(1, expert_TK, -torch.inf).amax(dim=1)
    return bool((others_T <= least_T + TOLERANCE * logit_TE.abs().amax(dim=1)).all())
