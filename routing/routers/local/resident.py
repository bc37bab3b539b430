"""Resident routing: a token chooses among a layer's resident experts, and swaps at most one of them for another.

Whoever keeps a layer's residents in fast memory reads at most one expert per token and layer. With `admits="next"` that
read is known one whole token before it is needed.

Shapes: T tokens, B sequences, S positions, E FFN experts, R = E + Z routable experts.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...choice.resident_scan import resident_scan
from ...contract.assignment import Routing
from ...contract.context import Carry, RoutingContext
from ...contract.router import RouterSizes
from ...contract.stats import RouterStats
from ..classic.classic import ClassicRouter, Scores
from ..classic.rule import RULE_PARTS, ClassicRule
from ..options import Options, expect_at_least
from .sequences import Sequences, SequenceState

HELD = "held_experts"
SHARE_OF_EXPERTS = 4
"""A quarter of the experts are residents by default: the share at which caches are compared in this project."""

Swaps = Literal["chosen", "better"]
Admits = Literal["now", "next"]


@dataclass(frozen=True, kw_only=True)
class ResidentOptions(Options):
    """Options of resident routing besides those of the rule.

    Args:
        residents: FFN experts that a sequence holds in each layer; a quarter of E, and at least K, if not given.
        swaps: which newcomer is let in: one that would be `chosen`, among the token's K best, or any that is `better`
            than the worst resident.
        admits: whether the expert that a token swaps in serves this token (`now`) or the `next` one on.
        margin: by how much a newcomer's score must exceed a resident's to count as better, at least 0.
    """

    residents: int | None = None
    swaps: Swaps = "chosen"
    admits: Admits = "now"
    margin: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_at_least("margin", self.margin, 0.0)


def resident_defaults(sizes: RouterSizes) -> dict[str, int]:
    """A quarter of the experts, and as many as a token chooses at least."""
    quarter = -(-sizes.num_experts // SHARE_OF_EXPERTS)
    return {"residents": min(sizes.num_experts, max(quarter, sizes.top_k))}


class ResidentRouter(ClassicRouter):
    """A classic router whose choice is limited to the resident experts; zero-compute experts are always there.

    The set of a sequence begins with the best experts of its first token. It is kept beside the keys of each position,
    so a prefill in one call and token by token end with the same set. What is swapped passes no gradient.

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves.
        rule: how logits become a routing; without groups.
        options: how many residents, and when a newcomer serves.

    Raises:
        ValueError: if residents lie outside 1..E or leave fewer than K choices, or the rule has groups.

    Source: github.com/ncylich/temporal-moe (2026); `admits="next"` is ours.
    """

    option_groups: ClassVar[tuple[type, ...]] = (*RULE_PARTS, ResidentOptions)

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule, options: ResidentOptions) -> None:
        super().__init__(sizes, layer, rule)
        residents = resident_defaults(sizes)["residents"] if options.residents is None else options.residents
        if not 1 <= residents <= sizes.num_experts or residents + sizes.num_zero_compute < sizes.top_k:
            raise ValueError(
                f"residents must lie in 1..{sizes.num_experts} (E) and leave top_k = {sizes.top_k} choices; "
                f"got {residents}"
            )
        if rule.grouping.num_groups != 1:
            raise ValueError("residents are chosen among all experts; leave num_groups out")
        self.residents, self.admits, self.margin = residents, options.admits, options.margin
        self.rank = residents if options.swaps == "better" else min(sizes.top_k, residents)

    @property
    def most_choices(self) -> int:
        return self.residents + self.sizes.num_zero_compute

    def choosable(self, scores: Scores, carry: Carry, context: RoutingContext) -> tuple[Tensor, Carry]:
        score_TR, E = scores.score_TR.detach(), self.sizes.num_experts
        sequences = Sequences.of(context, len(score_TR), score_TR.device)
        state = SequenceState(context.cache, self.sizes.first_state_layer + self.layer)
        ranked_TR = score_TR if self.bias_R is None else score_TR + self.bias_R
        before_BE = state.latest()
        score_BSE = sequences.grid(ranked_TR[:, :E])
        after_BSE = resident_scan(
            score_BSE, sequences.is_valid_BS, before_BE, self.residents, rank=self.rank, margin=self.margin
        )
        state.append(after_BSE)
        serving_BSE = after_BSE if self.admits == "now" else _sets_before(after_BSE, before_BE)
        is_serving_TE = sequences.flat(serving_BSE).bool()
        is_prefill = after_BSE.shape[1] > 1
        held_TE = torch.zeros_like(is_serving_TE) if is_prefill else is_serving_TE | sequences.flat(after_BSE).bool()
        is_choosable_TR = pad(is_serving_TE, (0, self.sizes.num_zero_compute), value=True)
        return score_TR.masked_fill(~is_choosable_TR, -torch.inf), carry.put(**{HELD: held_TE})

    def held_experts(self, result: tuple[Routing, Carry, RouterStats]) -> dict[int, Tensor]:
        """By layer, int64 ids of the experts that serve each sequence's token and the next one; empty for a prefill."""
        held_TE = result[1].get(HELD)
        assert held_TE is not None
        return {self.layer: held_TE.any(dim=0).nonzero()[:, 0]}


def _sets_before(after_BSE: Tensor, before_BE: Tensor | None) -> Tensor:
    """The set that each token found, and its own where it is the first of its sequence."""
    first_B1E = torch.zeros_like(after_BSE[:, :1]) if before_BE is None else before_BE[:, None]
    found_BSE = torch.cat([first_B1E, after_BSE[:, :-1]], dim=1)
    return torch.where(found_BSE.bool().any(dim=-1, keepdim=True), found_BSE, after_BSE)
