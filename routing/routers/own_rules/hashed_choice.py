"""DeepSeek-V4's routers: the first layers' experts follow from the token id, weights from learned scores.

Shapes: T tokens, K experts per token, R routable experts, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...contract.assignment import Routing
from ...contract.context import Carry, RoutingContext
from ...contract.router import RouterSizes
from ...contract.stats import RouterStats
from ..classic.classic import ClassicRouter
from ..classic.rule import RULE_PARTS, ClassicRule
from ..options import Options, expect_at_least

PUBLISHED_LAYERS = 3
"""Hash-routed layers of DeepSeek-V4, as transformers' `DeepseekV4Config` has them."""


@dataclass(frozen=True, kw_only=True)
class HashedLayers(Options):
    """Options of DeepSeek-V4 besides those of the rule.

    Args:
        hash_layers: MoE layers at the beginning whose experts follow from the token id; 3, and at most L - 1, if not
            given.
        seed: of their tables; the same seed gives the same tables.
    """

    hash_layers: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hash_layers is not None:
            expect_at_least("hash_layers", self.hash_layers, 0)


class HashedChoiceRouter(ClassicRouter):
    """A fixed, balanced table from token id to experts chooses; the learned scores of these experts weigh.

    Args:
        sizes: D, E, Z, K, L and V.
        layer: which MoE layer this router serves; every layer has its own table.
        rule: how logits become weights; without groups and bias, which would change a choice.
        seed: of the table; the same seed gives the same table.

    Raises:
        ValueError: if the vocabulary is unknown.

    Source: DeepSeek-AI 2026 (DeepSeek-V4), section 2.1; transformers' `DeepseekV4HashRouter`.
    """

    has_fixed_top_k = True
    option_groups: ClassVar[tuple[type, ...]] = (*RULE_PARTS, HashedLayers)

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule, seed: int = 0) -> None:
        super().__init__(sizes, layer, rule)
        if sizes.vocab_size is None:
            raise ValueError("hash routing needs the vocabulary size")
        place_V = np.random.default_rng([seed, layer]).permutation(sizes.vocab_size)
        choice_VK = (place_V[:, None] + np.arange(sizes.top_k)) % sizes.num_routable
        self.register_buffer("expert_VK", torch.from_numpy(choice_VK))
        self.hashed: tuple[HashedChoiceRouter, ...] = ()

    @classmethod
    def of_rule(cls, sizes: RouterSizes, rule: ClassicRule, *own: Any) -> list[nn.Module]:
        """The first layers by table, the others by scores. Raises ValueError if there are fewer layers than tables."""
        (options,) = own
        default = min(PUBLISHED_LAYERS, sizes.num_layers - 1)
        count = default if options.hash_layers is None else options.hash_layers
        if count > sizes.num_layers:
            raise ValueError(f"hash_layers must be at most {sizes.num_layers} (L); got {count}")
        first = [cls(sizes, layer, rule, options.seed) for layer in range(count)]
        if first:
            first[0].hashed = tuple(first[1:])
        return [*first, *(ClassicRouter(sizes, layer, rule) for layer in range(count, sizes.num_layers))]

    def select(self, logit_TR: Tensor, score_TR: Tensor, context: RoutingContext) -> Tensor:
        self.top_k(context)
        if context.token_id_T is None:
            raise ValueError("hash routing needs token ids; the model got embeddings instead of input_ids")
        return self.expert_VK[context.token_id_T]

    def exact_plan(
        self, result: tuple[Routing, Carry, RouterStats], x_TD: Tensor, carry: Carry, context: RoutingContext
    ) -> dict[int, Tensor]:
        """The first layer's router names the experts of all later hashed layers, int64 [T, K] each."""
        return {router.layer: router.expert_VK[context.token_id_T] for router in self.hashed}

    def post_step(self, count_R: Tensor, num_tokens: int) -> None:
        """A table needs no balance."""
