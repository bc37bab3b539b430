"""Oracle of a Duo-LLM: for every token the route through big and small modules that predicts the next token best.

What earlier tokens left in the key/value cache is part of the question, and the paper does not say what it was. Here it
is chosen: `oracle` lets every earlier token keep the route that was best for it, so that the result is a whole text's
greedy oracle; `big` lets earlier tokens take big modules only, so that each token is judged beside a full model.

Shapes: B sequences, S positions, L layers, X candidate routes.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import combinations, product
from math import comb
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Cache, DynamicCache

from moe import MoEForCausalLM

# ids of a layer's modules, as in moe/architectures/duo.py
BIG, SMALL, SKIP = 0, 1, 2
# up to so many routes are all tried; the 924 routes with half of 12 layers big are among them
MOST_ROUTES = 1000
History = Literal["oracle", "big"]


@dataclass(frozen=True, kw_only=True, eq=False)
class OracleRoutes:
    """What the search found for tokens 0 .. S-2, each judged by the token after it.

    Args:
        route_BSL: int64 module ids.
        loss_BS: nats.
        is_exact: whether every route was tried.
    """

    route_BSL: Tensor
    loss_BS: Tensor
    is_exact: bool


@torch.no_grad()
def oracle_routes(
    model: MoEForCausalLM,
    token_BS: Tensor,
    num_big: int,
    *,
    history: History = "oracle",
    beam: int | None = None,
    most_routes: int = MOST_ROUTES,
) -> OracleRoutes:
    """The best route with exactly `num_big` big layers for every token but the last.

    Exact where there are at most `most_routes` routes; otherwise, or when `beam` is given, a beam grows the set of big
    layers one by one from the all-small route and keeps the sets with the lowest loss, which is exact once the beam is
    as wide as there are sets.

    Args:
        model: a Duo-LLM in evaluation mode.
        token_BS: int64 sequences without padding.
        num_big: big layers of every token.
        history: what earlier tokens left in the cache.
        beam: sets of big layers that are kept.
        most_routes: up to so many are all tried.

    Raises:
        ValueError: if `num_big` does not fit the layers, or a beam is needed for a model whose layers can be skipped.

    Source: Alizadeh et al. 2024 (Duo-LLM), arXiv:2410.10846, section 3.2.
    """
    layers, modules = _shape(model)
    if not 0 <= num_big <= layers:
        raise ValueError(f"num_big must lie in 0..{layers}, the layers with two modules; got {num_big}")
    if history not in ("oracle", "big"):
        raise ValueError(f"history must be oracle or big; got {history!r}")
    is_exact = beam is None and count_routes(layers, num_big, modules) <= most_routes
    if not is_exact and modules > 2:
        raise ValueError("a beam grows sets of big layers and knows no skipping; raise most_routes for an exact search")
    cache, routes, losses = DynamicCache(config=model.config), [], []
    all_XL = torch.tensor(list(every_route(layers, num_big, modules))) if is_exact else None
    for position in range(token_BS.shape[1] - 1):
        token_B1, target_B = token_BS[:, position : position + 1], token_BS[:, position + 1]
        judge = _Judge(model, cache, token_B1, target_B)
        if all_XL is not None:
            route_BL, loss_B = judge.best(all_XL.expand(len(token_BS), -1, -1))
        else:
            route_BL, loss_B = _beam(judge, layers, num_big, beam or most_routes)
        routes.append(route_BL)
        losses.append(loss_B)
        kept_BL = route_BL if history == "oracle" else torch.full_like(route_BL, BIG)
        with model.model.stack.following(kept_BL):
            model(token_B1, past_key_values=cache, use_cache=True)
    return OracleRoutes(route_BSL=torch.stack(routes, dim=1), loss_BS=torch.stack(losses, dim=1), is_exact=is_exact)


def every_route(layers: int, num_big: int, modules: int) -> Iterator[list[int]]:
    """All routes with exactly `num_big` big layers; the other layers take any other module."""
    for big in combinations(range(layers), num_big):
        for rest in product(range(1, modules), repeat=layers - num_big):
            others = iter(rest)
            yield [BIG if layer in big else next(others) for layer in range(layers)]


def count_routes(layers: int, num_big: int, modules: int) -> int:
    """How many `every_route` yields."""
    return comb(layers, num_big) * (modules - 1) ** (layers - num_big)


@torch.no_grad()
def route_loss(model: MoEForCausalLM, token_BS: Tensor, route_BSL: Tensor | None = None) -> float:
    """Mean nats per predicted token when all tokens follow a route; the model's own choice without one."""
    if route_BSL is None:
        return model(token_BS, labels=token_BS, use_cache=False).lm_loss.item()
    with model.model.stack.following(route_BSL.flatten(0, 1)):
        return model(token_BS, labels=token_BS, use_cache=False).lm_loss.item()


@dataclass(frozen=True, eq=False)
class _Judge:
    """Scores routes of one position by the loss of the token that follows."""

    model: MoEForCausalLM
    cache: Cache
    token_B1: Tensor
    target_B: Tensor

    def losses(self, route_BXL: Tensor) -> Tensor:
        """[B, X] nats."""
        B, X, _ = route_BXL.shape
        cache = deepcopy(self.cache)
        cache.batch_repeat_interleave(X)
        with self.model.model.stack.following(route_BXL.flatten(0, 1)):
            rows = self.token_B1.repeat_interleave(X, dim=0)
            logits = self.model(rows, past_key_values=cache, use_cache=True).logits[:, -1]
        return cross_entropy(logits.float(), self.target_B.repeat_interleave(X), reduction="none").view(B, X)

    def best(self, route_BXL: Tensor) -> tuple[Tensor, Tensor]:
        """The route with the lowest loss of each row, the first of equals."""
        loss_BX = self.losses(route_BXL)
        loss_B, place_B = loss_BX.min(dim=1)
        return route_BXL[torch.arange(len(route_BXL)), place_B], loss_B


def _beam(judge: _Judge, layers: int, num_big: int, width: int) -> tuple[Tensor, Tensor]:
    """Sets of big layers as bits, grown one layer at a time."""
    bit_L = 2 ** torch.arange(layers)
    set_BX = torch.zeros(len(judge.target_B), 1, dtype=torch.int64)
    loss_BX = judge.losses(_as_routes(set_BX, bit_L))
    for _ in range(num_big):
        grown_BX = (set_BX[:, :, None] | bit_L).flatten(1)
        is_new_BX = ((set_BX[:, :, None] & bit_L) == 0).flatten(1)
        grown_BX, order_BX = grown_BX.masked_fill(~is_new_BX, 0).sort(dim=1)
        is_first_BX = torch.ones_like(is_new_BX)
        is_first_BX[:, 1:] = grown_BX[:, 1:] != grown_BX[:, :-1]
        usable_BX = is_new_BX.gather(1, order_BX) & is_first_BX
        loss_BX = judge.losses(_as_routes(grown_BX, bit_L)).masked_fill(~usable_BX, torch.inf)
        kept = loss_BX.topk(min(width, int(usable_BX.sum(dim=1).min())), dim=1, largest=False)
        set_BX, loss_BX = grown_BX.gather(1, kept.indices), kept.values
    best_B1 = loss_BX.argmin(dim=1, keepdim=True)
    return _as_routes(set_BX.gather(1, best_B1), bit_L)[:, 0], loss_BX.gather(1, best_B1)[:, 0]


def _as_routes(set_BX: Tensor, bit_L: Tensor) -> Tensor:
    return torch.where((set_BX[..., None] & bit_L) > 0, BIG, SMALL)


def _shape(model: MoEForCausalLM) -> tuple[int, int]:
    """Layers with two modules, and modules of each."""
    if model.config.architecture != "duo_llm":
        raise ValueError(f"an oracle needs the architecture duo_llm; this model is {model.config.architecture!r}")
    routers = model.model.routers
    return len(routers), routers[0].sizes.num_routable
