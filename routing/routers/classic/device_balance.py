"""DeepSeek-V2's router: what balances devices and the traffic between them, beside the balance of experts.

Shapes: T tokens, K experts per token, R routable experts, G groups of experts (one per device).
"""

import torch
from torch import Tensor

from ...contract.assignment import Routing
from ...contract.router import RouterSizes, RoutingContext
from .classic import ClassicRouter
from .rule import ClassicRule


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
        device_weight: coefficient of the device loss.
        communication_weight: coefficient of the communication loss.

    Raises:
        ValueError: if there is one group only or a coefficient is negative.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), arXiv:2405.04434, eqs. 26-31.
    """

    def __init__(
        self,
        sizes: RouterSizes,
        layer: int,
        rule: ClassicRule,
        device_weight: float = 0.05,
        communication_weight: float = 0.02,
    ) -> None:
        if rule.num_groups == 1:
            raise ValueError("device losses balance groups of experts; give num_groups above 1, for instance 8")
        if device_weight < 0 or communication_weight < 0:
            raise ValueError(
                f"device_weight and communication_weight must not be negative; "
                f"got {device_weight} and {communication_weight}"
            )
        super().__init__(sizes, layer, rule)
        self.device_weight, self.communication_weight = device_weight, communication_weight

    def penalty_T(self, probability_TR: Tensor, chosen: Routing, context: RoutingContext) -> Tensor | None:
        """Its mean over valid tokens is the weighted sum of both losses."""
        T, K = chosen.expert_TK.shape
        G, R = self.rule.num_groups, self.sizes.num_routable
        num_tokens = T if context.is_valid_T is None else context.is_valid_T.sum()
        count_G = chosen.count_R.view(G, -1).sum(dim=-1).to(probability_TR.dtype)
        load_G = G * count_G / (K * num_tokens)
        # empty slots, of padding, fall into a group of their own
        is_sent_TG = torch.zeros(T, G + 1, dtype=torch.bool, device=chosen.expert_TK.device)
        is_sent_TG = is_sent_TG.scatter(1, chosen.expert_TK // (R // G), True)[:, :G]
        sent_G = G * is_sent_TG.sum(dim=0).to(probability_TR.dtype) / (self.rule.groups_kept * num_tokens)
        price_G = self.device_weight * load_G + self.communication_weight * sent_G
        return probability_TR.unflatten(-1, (G, -1)).sum(dim=-1) @ price_G
