"""DeepSeek-V2's router: losses that balance devices and the traffic between them, beside the balance of experts.

Shapes: T tokens, K experts per token, R routable experts, G groups of experts (one per device).
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...contract.assignment import Routing
from ...contract.context import RoutingContext
from ...contract.router import RouterSizes
from ..options import Options
from .classic import ClassicRouter
from .rule import RULE_PARTS, ClassicRule

DEVICE_WEIGHT, COMMUNICATION_WEIGHT = 0.05, 0.02  # as published: section 3.1.2


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Options of DeepSeek-V2 besides those of the rule; both need groups.

    Args:
        device_weight: coefficient of the device loss; 0.05 if not given.
        communication_weight: coefficient of the communication loss; 0.02 if not given.

    Raises:
        ValueError: if a coefficient is negative.
    """

    device_weight: float | None = None
    communication_weight: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.device_weight or 0, self.communication_weight or 0) < 0:
            raise ValueError(
                f"device_weight and communication_weight must not be negative; "
                f"got {self.device_weight} and {self.communication_weight}"
            )


class DeviceBalancedRouter(ClassicRouter):
    """A group-limited router with two more losses, which it weighs itself: the groups are devices.

    The device loss is the sum over devices of its experts' mean relative load times their summed probability. The
    communication loss has, instead of that load, the share of tokens sent to the device relative to `groups_kept / G`.
    Both are 1 when uniform, over the batch's valid tokens. The expert loss is the balance loss of the rule, and its
    coefficient the trainer's (published: 0.003).

    Args:
        sizes: D, E, Z, K, L.
        layer: which MoE layer this router serves.
        rule: how logits become a routing; more than one group.
        options: coefficients of both losses.

    Raises:
        ValueError: if there is one group only.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), arXiv:2405.04434, eqs. 26-31.
    """

    option_groups: ClassVar[tuple[type, ...]] = (*RULE_PARTS, DeviceOptions)

    def __init__(self, sizes: RouterSizes, layer: int, rule: ClassicRule, options: DeviceOptions) -> None:
        if rule.grouping.num_groups == 1:
            raise ValueError("device losses balance groups of experts; give num_groups above 1, for instance 8")
        super().__init__(sizes, layer, rule)
        given = (options.device_weight, options.communication_weight)
        self.device_weight = DEVICE_WEIGHT if given[0] is None else given[0]
        self.communication_weight = COMMUNICATION_WEIGHT if given[1] is None else given[1]

    @classmethod
    def of_rule(cls, sizes: RouterSizes, rule: ClassicRule, *own: Any) -> list[nn.Module]:
        """Without groups and without device options the rule alone is left."""
        if rule.grouping.num_groups == 1 and own == (DeviceOptions(),):
            return ClassicRouter.of_rule(sizes, rule)
        return super().of_rule(sizes, rule, *own)

    def penalty_T(self, probability_TR: Tensor, chosen: Routing, context: RoutingContext) -> Tensor | None:
        """Its mean over valid tokens is the weighted sum of both losses."""
        T, K = chosen.expert_TK.shape
        G, R = self.rule.grouping.num_groups, self.sizes.num_routable
        num_tokens = T if context.is_valid_T is None else context.is_valid_T.sum()
        count_G = chosen.count_R.view(G, -1).sum(dim=-1).to(probability_TR.dtype)
        load_G = G * count_G / (K * num_tokens)
        # empty slots, of padding, fall into a group of their own
        is_sent_TG = torch.zeros(T, G + 1, dtype=torch.bool, device=chosen.expert_TK.device)
        is_sent_TG = is_sent_TG.scatter(1, chosen.expert_TK // (R // G), True)[:, :G]
        sent_G = G * is_sent_TG.sum(dim=0).to(probability_TR.dtype) / (self.rule.grouping.groups_kept * num_tokens)
        price_G = self.device_weight * load_G + self.communication_weight * sent_G
        return probability_TR.unflatten(-1, (G, -1)).sum(dim=-1) @ price_G
