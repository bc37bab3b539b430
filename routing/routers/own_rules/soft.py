"""Soft MoE's router: every expert slot reads a weighted mean of all tokens, every token a weighted mean of all slots.

It is no token-to-expert assignment, so it returns mixing weights instead of a `Routing`, and later tokens reach earlier
ones: a model with it scores whole sequences and cannot generate.

Shapes: T = B * S tokens, D model width, E experts, Q = E * slots per expert.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ...contract.context import Carry, RoutingContext
from ...contract.module import RouterModule, at_least_float32
from ...contract.router import RouterSizes
from ...contract.stats import RouterStats
from ..options import Options, expect_at_least


@dataclass(frozen=True, kw_only=True)
class SoftOptions(Options):
    """The option of Soft MoE.

    Args:
        slots_per_expert: at least 1; E times this should be near the sequence length.
    """

    slots_per_expert: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        expect_at_least("slots_per_expert", self.slots_per_expert, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotMix:
    """The two linear maps of one layer.

    Args:
        dispatch_BSQ: weight of each token in each slot's input; sums to 1 over a sequence's tokens.
        combine_BSQ: weight of each slot in each token's output; sums to 1 over slots, 0 for padding.
        expert_Q: int64 expert of each slot.
    """

    dispatch_BSQ: Tensor
    combine_BSQ: Tensor
    expert_Q: Tensor


class SoftRouter(RouterModule):
    """Cosine logits between tokens and slots, softmaxed both ways.

    Args:
        sizes: D, E, L; K and zero-compute experts have no meaning here.
        layer: which MoE layer this router serves.
        options: how many slots an expert computes per sequence.

    Raises:
        ValueError: if there are zero-compute experts.

    Source: Puigcerver et al. 2023, arXiv:2308.00951, eqs. 1-3 and section 2.3 (normalisation).
    """

    is_causal = False
    has_fixed_top_k = True
    option_groups: ClassVar[tuple[type, ...]] = (SoftOptions,)

    def __init__(self, sizes: RouterSizes, layer: int, options: SoftOptions) -> None:
        if sizes.num_zero_compute:
            raise ValueError("soft_moe mixes all tokens into every slot, so it has no use for zero-compute experts")
        super().__init__(sizes, layer)
        self.slots_per_expert = options.slots_per_expert
        self.weight = nn.Parameter(torch.empty(sizes.num_experts * options.slots_per_expert, sizes.width))
        self.scale = nn.Parameter(torch.empty(1))

    def init_parameters(self, std: float) -> None:
        super().init_parameters(std)
        nn.init.ones_(self.scale)

    def forward(self, x_TD: Tensor, carry: Carry, context: RoutingContext) -> tuple[SlotMix, Carry, RouterStats]:
        self.top_k(context)
        self.expect_no_logit_bias(context)
        B = 1 if context.sequence_T is None else int(context.sequence_T[-1]) + 1
        with torch.autocast(x_TD.device.type, enabled=False):
            x_BSD = at_least_float32(x_TD).unflatten(0, (B, -1))
            slot_QD = normalize(self.weight.to(x_BSD.dtype), dim=-1) * self.scale.to(x_BSD.dtype)
            logit_BSQ = normalize(x_BSD, dim=-1) @ slot_QD.T
            dispatch_BSQ, combine_BSQ = self._both_softmaxes(logit_BSQ, context)
            expert_Q = torch.arange(logit_BSQ.shape[-1], device=x_TD.device) // self.slots_per_expert
            stats = self._stats(combine_BSQ, expert_Q, context)
        return SlotMix(dispatch_BSQ=dispatch_BSQ, combine_BSQ=combine_BSQ, expert_Q=expert_Q), carry, stats

    def _both_softmaxes(self, logit_BSQ: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor]:
        if context.is_valid_T is None:
            return logit_BSQ.softmax(dim=1), logit_BSQ.softmax(dim=2)
        is_valid_BS1 = context.is_valid_T.view(*logit_BSQ.shape[:2], 1)
        # not -inf, of which a sequence of padding alone would have no softmax
        masked_BSQ = logit_BSQ.masked_fill(~is_valid_BS1, torch.finfo(logit_BSQ.dtype).min)
        return masked_BSQ.softmax(dim=1) * is_valid_BS1, logit_BSQ.softmax(dim=2) * is_valid_BS1

    def _stats(self, combine_BSQ: Tensor, expert_Q: Tensor, context: RoutingContext) -> RouterStats:
        """Loads count slots of sequences that are not all padding; every expert has as many as the others."""
        B, _, Q = combine_BSQ.shape
        probability_TE = combine_BSQ.unflatten(-1, (-1, self.slots_per_expert)).sum(dim=-1).flatten(0, 1)
        valid_T = slice(None) if context.is_valid_T is None else context.is_valid_T
        if context.is_valid_T is not None:
            B = int(context.is_valid_T.view(B, -1).any(dim=1).sum())
        slots = self.routing(expert_Q.repeat(B)[:, None], combine_BSQ.new_ones(B * Q, 1).float())
        return RouterStats(probability_TR=probability_TE[valid_T], chosen=slots, kept=slots, balance_loss="none")
