"""Pre-gated routing: the gate of a block is read some blocks earlier, so its experts are known before they are needed.

Shapes: T tokens, D model width, K experts per token, R routable experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...contract.assignment import Routing
from ...contract.context import Carry, RoutingContext
from ...contract.module import RouterModule
from ...contract.stats import RouterStats
from ..options import Options

PLANNED = ("expert", "kept_expert", "weight", "kept_weight", "probability", "logit", "penalty")


@dataclass(frozen=True, kw_only=True)
class PreGateOptions(Options):
    """Options of pre-gated routing.

    Args:
        ahead: each gate is read so many blocks before the one that it decides for, 0..L-1; 0 is `inner` itself.
        inner: the router, by name, that is pre-gated.
        inner_options: options of the inner router; none if not given.
    """

    ahead: int = 1
    inner: str = "mixtral"
    inner_options: dict[str, Any] | None = None


class PreGate(nn.Module):
    """One block of a pre-gated model: takes the plan made for it, and makes the plan of the block `ahead` of it.

    Both the choice and the weights come from the earlier block's input, so the language-model loss reaches a gate
    through the weights used later. The first `ahead` blocks own a gate for themselves; the last `ahead` plan nothing.
    Statistics are booked to the block that uses the plan. The plan lives in the carry: it starts anew with every
    forward pass, decode steps included.

    Args:
        gates: one router per block, by the block that it decides for; this module registers those that it calls.
        layer: the block that this module stands in.
        ahead: how many blocks earlier a gate is read, at least 1.

    Source: Hwang et al. 2023 (Pre-gated MoE), arXiv:2308.12066, section 4.1; `ahead` is their activation level N.
    """

    option_groups: ClassVar[tuple[type, ...]] = (PreGateOptions,)

    def __init__(self, gates: Sequence[RouterModule], layer: int, ahead: int) -> None:
        super().__init__()
        self.layer, self.ahead = layer, ahead
        self.own_gate = gates[layer] if layer < ahead else None
        self.pre_gate = gates[layer + ahead] if layer + ahead < len(gates) else None
        self._deciding = (gates[layer],)  # registered where it is called; in a tuple, or torch would register it here

    @property
    def is_causal(self) -> bool:
        """Whether the gates are."""
        return self._deciding[0].is_causal

    def flops(self) -> float:
        """Of the gates that this block reads."""
        return sum((gate.flops() for gate in (self.own_gate, self.pre_gate) if gate is not None), 0.0)

    def begin(self, context: RoutingContext) -> Carry:
        return self._deciding[0].begin(context)

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        if self.own_gate is not None:
            routing, carry, stats = self.own_gate(x_TD, carry, context)
        else:
            routing, carry, stats = self._planned(carry, context)
        if self.pre_gate is not None:
            plan, carry, plan_stats = self.pre_gate(x_TD, carry, context)
            carry = self._put_plan(carry, self.layer + self.ahead, plan, plan_stats, context)
        return routing, carry, stats

    def exact_plan(self, result: tuple[Routing, Carry, RouterStats], *inputs: object) -> dict[int, Tensor]:
        """Later blocks' experts, int64 [T, K] each, that what `forward` returned already fixes."""
        planned = planned_experts(result[1], self.layer + self.ahead)
        return {} if planned is None else {self.layer + self.ahead: planned}

    def post_step(self, count_R: Tensor, num_tokens: int) -> None:
        """The counts of this block concern the gate that decided for it."""
        self._deciding[0].post_step(count_R, num_tokens)

    def notes(self) -> list[Tensor]:
        return self._deciding[0].notes()

    def _put_plan(self, carry: Carry, layer: int, plan: Routing, stats: RouterStats, context: RoutingContext) -> Carry:
        """Everything that block `layer` needs, one row per token, padding included."""
        facts = {
            "expert": _all_rows(stats.chosen.expert_TK, context, plan.empty_id),
            "kept_expert": plan.expert_TK,
            "weight": _all_rows(stats.chosen.weight_TK, context),
            "kept_weight": plan.weight_TK,
            "probability": _all_rows(stats.probability_TR, context),
            "logit": _all_rows(stats.logit_TR, context),
            "penalty": _all_rows(stats.penalty_T, context),
        }
        return carry.put(**{_key(layer, name): value for name, value in facts.items() if value is not None})

    def _planned(self, carry: Carry, context: RoutingContext) -> tuple[Routing, Carry, RouterStats]:
        plan = {name: carry.get(_key(self.layer, name)) for name in PLANNED}
        if plan["expert"] is None:
            raise ValueError(f"block {self.layer} got no plan; block {self.layer - self.ahead} must run before it")
        gate = self._deciding[0]
        chosen = gate.routing(plan["expert"], plan["weight"])
        kept = gate.routing(plan["kept_expert"], plan["kept_weight"])
        stats = gate.stats(
            chosen,
            kept,
            context,
            probability_TR=plan["probability"],
            logit_TR=plan["logit"],
            penalty_T=plan["penalty"],
        )
        return kept, carry.drop(*(_key(self.layer, name) for name in PLANNED)), stats


def planned_experts(carry: Carry, layer: int) -> Tensor | None:
    """int64 [T, K] experts that the carry already fixes for `layer`: an exact prefetch plan; None if there is none."""
    return carry.get(_key(layer, "kept_expert"))


def _key(layer: int, name: str) -> str:
    return f"plan_{layer}_{name}"


def _all_rows(x: Tensor | None, context: RoutingContext, fill: int = 0) -> Tensor | None:
    """Rows of valid tokens put back among padding, so that they stay aligned with the tokens."""
    if x is None or context.is_valid_T is None:
        return x
    full = torch.full((len(context.is_valid_T), *x.shape[1:]), fill, dtype=x.dtype, device=x.device)
    return full.index_put((context.is_valid_T,), x)
