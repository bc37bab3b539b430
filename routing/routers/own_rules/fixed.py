"""Routers that do not look at hidden states: a hash of the token id, or a given routing replayed.

Shapes: T tokens, K experts per token, R routable experts, V vocabulary, P positions of a replayed routing.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ...contract.assignment import Routing
from ...contract.context import Carry, RoutingContext
from ...contract.module import RouterModule, drop_padding
from ...contract.router import RouterSizes
from ...contract.stats import RouterStats
from ..options import Options, expect_at_least

RowBy = Literal["position", "order"]


@dataclass(frozen=True, kw_only=True)
class HashOptions(Options):
    """The option of hash routing.

    Args:
        seed: of the tables; the same seed gives the same tables.
    """

    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ForcedOptions(Options):
    """Options of a replayed routing.

    Args:
        num_rows: rows of the routing, at least 1.
        row_by: a token takes the row of its `position` in its sequence, or of its `order` among the call's tokens.
    """

    num_rows: int = 1
    row_by: RowBy = "position"

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_at_least("num_rows", self.num_rows, 1)


class HashRouter(RouterModule):
    """A fixed, random, balanced table from token id to experts; weights 1 / K, no parameters.

    Args:
        sizes: E, K, L and V.
        layer: which MoE layer this router serves; every layer has its own table.
        options: seed of the tables.

    Source: Roller et al. 2021, arXiv:2106.04426, section 3.1 (balanced random assignment).
    """

    has_fixed_top_k = True
    option_groups: ClassVar[tuple[type, ...]] = (HashOptions,)

    def __init__(self, sizes: RouterSizes, layer: int, options: HashOptions) -> None:
        super().__init__(sizes, layer)
        if sizes.vocab_size is None:
            raise ValueError("hash routing needs the vocabulary size")
        R, V = sizes.num_routable, sizes.vocab_size
        place_V = np.random.default_rng([options.seed, layer]).permutation(V)
        self.register_buffer("expert_VK", torch.from_numpy((place_V[:, None] + np.arange(sizes.top_k)) % R))

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        if context.token_id_T is None:
            raise ValueError("hash routing needs token ids; the model got embeddings instead of input_ids")
        expert_TK = self.expert_VK[context.token_id_T]
        weight_TK = torch.full(expert_TK.shape, 1 / self.sizes.top_k, device=expert_TK.device)
        return fixed_routing(self, self.routing(expert_TK, weight_TK), carry, context)


class ForcedRouter(RouterModule):
    """Replays a routing that was set with `replay`; before that every slot is empty.

    Args:
        sizes: E, Z, K, L.
        layer: which MoE layer this router serves.
        options: how many rows, and which a token takes.
    """

    has_fixed_top_k = True
    option_groups: ClassVar[tuple[type, ...]] = (ForcedOptions,)

    def __init__(self, sizes: RouterSizes, layer: int, options: ForcedOptions) -> None:
        super().__init__(sizes, layer)
        self.row_by = options.row_by
        self.register_buffer("expert_PK", torch.full((options.num_rows, sizes.top_k), sizes.num_routable))
        self.register_buffer("weight_PK", torch.zeros(options.num_rows, sizes.top_k))

    @torch.no_grad()
    def replay(self, expert_PK: Tensor, weight_PK: Tensor | None = None) -> None:
        """Set the rows; weights are 1 / K without `weight_PK`. Raises ValueError if they do not fit."""
        if expert_PK.shape != self.expert_PK.shape or expert_PK.is_floating_point():
            raise ValueError(
                f"expected int64 ids {tuple(self.expert_PK.shape)}; got {expert_PK.dtype} {tuple(expert_PK.shape)}"
            )
        ordered_PK = expert_PK.sort(dim=1).values
        is_twice_P = ((ordered_PK[:, 1:] == ordered_PK[:, :-1]) & (ordered_PK[:, 1:] < self.sizes.num_routable)).any(
            dim=1
        )
        if is_twice_P.any():
            raise ValueError(f"row {int(is_twice_P.nonzero()[0])} names an expert twice")
        if weight_PK is None:
            weight_PK = (expert_PK < self.sizes.num_routable) / self.sizes.top_k
        self.routing(expert_PK.long(), weight_PK.float()).validate()
        self.expert_PK.copy_(expert_PK)
        self.weight_PK.copy_(weight_PK)

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        row_T = context.position_T if self.row_by == "position" else torch.arange(len(x_TD), device=x_TD.device)
        if row_T is None:
            raise ValueError("a forced routing by position needs positions in the context")
        if int(row_T.max()) >= len(self.expert_PK):
            raise ValueError(f"the forced routing has {len(self.expert_PK)} rows; row {int(row_T.max())} was asked for")
        return fixed_routing(self, self.routing(self.expert_PK[row_T], self.weight_PK[row_T]), carry, context)


def fixed_routing(
    router: RouterModule, routing: Routing, carry: Carry, context: RoutingContext
) -> tuple[Routing, Carry, RouterStats]:
    """Statistics of a routing without scores: the distribution is the choice itself."""
    router.top_k(context)
    router.expect_no_logit_bias(context)
    routing = drop_padding(routing, context)
    share_TR = torch.zeros(len(routing.expert_TK), routing.num_routable + 1, device=routing.expert_TK.device)
    share_TR = share_TR.scatter(1, routing.expert_TK, 1.0)[:, : routing.num_routable]
    share_TR = share_TR / share_TR.sum(dim=-1, keepdim=True).clamp_min(1.0)
    return routing, carry, router.stats(routing, routing, context, probability_TR=share_TR)
