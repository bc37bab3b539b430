"""Losses that balance devices and their traffic (DeepSeek-V2); twin of `routing.routers.classic.device_balance`.

Shapes: T tokens, K experts per token, R routable experts, G groups of experts (one per device).
"""

from typing import Any

import jax.numpy as jnp
from einops import rearrange
from jax import Array

from .assignment import Routing, RoutingContext
from .classic import ClassicRouter


class DeviceBalancedRouter(ClassicRouter):
    """A group-limited router with two more losses, which it weighs itself: the groups are devices.

    Args:
        device_weight: coefficient of the device loss.
        communication_weight: coefficient of the communication loss.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), arXiv:2405.04434, eqs. 26-31.
    """

    def __init__(self, *args: Any, device_weight: float, communication_weight: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self.device_weight, self.communication_weight = device_weight, communication_weight

    def penalty(self, probability_TR: Array, chosen: Routing, context: RoutingContext) -> Array | None:
        """The weighted sum of both losses."""
        T, K = chosen.expert_TK.shape
        G, R = self.rule.grouping.num_groups, chosen.num_routable
        valid_T = jnp.ones(T, bool) if context.is_valid_T is None else context.is_valid_T
        num_tokens = jnp.maximum(valid_T.sum(), 1)
        load_G = G * chosen.count_R.reshape(G, -1).sum(axis=-1) / (K * num_tokens)
        # empty slots, of padding, fall into none of the groups
        is_sent_TG = (chosen.expert_TK[:, :, None] // (R // G) == jnp.arange(G)).any(axis=1)
        sent_G = G * is_sent_TG.sum(axis=0) / (self.rule.grouping.groups_kept * num_tokens)
        probability_G = rearrange(jnp.where(valid_T[:, None], probability_TR, 0.0), "t (g r) -> t g r", g=G).sum((0, 2))
        price_G = self.device_weight * load_G + self.communication_weight * sent_G
        return price_G @ probability_G / num_tokens
