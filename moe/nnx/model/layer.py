"""MoELayer: router, experts, shared and zero-compute experts of one decoder layer; twin of `moe.layer`.

Shapes: T tokens, D model width, Z zero-compute experts.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from ...parts.config import MoEConfig
from ..parts.dense import FeedForward, normal
from ..routing.assignment import Carry, RouterStats, Routing, RoutingContext
from .experts import Experts


class ZeroComputeExperts(nnx.Module):
    """The Z zero-compute experts of one layer, in the order of their ids; see `moe.zero_compute`.

    Args:
        kinds: `zero`, `copy` or `constant` for each of them.
        width: D, the width of tokens in and out.
        std: of the initial weights.
        rngs: random streams; `params` draws the initial weights.
    """

    def __init__(self, kinds: Sequence[str], width: int, std: float, rngs: nnx.Rngs) -> None:
        self.kinds = tuple(kinds)
        num_constant = self.kinds.count("constant")
        self.constant = normal(rngs, (num_constant, width), std) if num_constant else None
        self.mix = normal(rngs, (num_constant, 2, width), std) if num_constant else None

    def __call__(self, x_TD: Array, routing: Routing) -> Array:
        """[T, D]: the weighted sum of what the chosen zero-compute experts return."""
        y_TD = jnp.zeros_like(x_TD)
        num_constants_seen = 0
        for place, kind in enumerate(self.kinds):
            is_it_TK = routing.expert_TK == routing.E + place
            weight_T1 = jnp.where(is_it_TK, routing.weight_TK, 0.0).sum(axis=-1, keepdims=True)
            if kind == "copy":
                y_TD = y_TD + weight_T1 * x_TD
            elif kind == "constant":
                y_TD = y_TD + weight_T1 * self._constant(x_TD, num_constants_seen)
                num_constants_seen += 1
        return y_TD.astype(x_TD.dtype)

    def _constant(self, x_TD: Array, index: int) -> Array:
        share_T2 = jax.nn.softmax(x_TD @ self.mix[index].T.astype(x_TD.dtype))
        return share_T2[:, :1] * x_TD + share_T2[:, 1:] * self.constant[index].astype(x_TD.dtype)


class MoELayer(nnx.Module):
    """Replaces the feed-forward network of a decoder layer.

    Args:
        rngs: random streams; `params` draws the initial weights.
        product: how experts are computed; see `Experts`.
    """

    def __init__(self, config: MoEConfig, router: nnx.Module, rngs: nnx.Rngs, product: str | None) -> None:
        width, std = config.hidden_size, config.initializer_range
        self.router = router
        self.experts = Experts(config, rngs, product)
        shared_width = config.num_shared_experts * config.moe_intermediate_size
        self.shared = FeedForward(width, shared_width, config.hidden_act, std, rngs) if shared_width else None
        kinds = config.zero_compute_experts
        self.zero_compute = ZeroComputeExperts(kinds, width, std, rngs) if kinds else None

    def __call__(self, x_TD: Array, carry: Carry, context: RoutingContext) -> tuple[Array, Carry, RouterStats]:
        """[T, D] to add to the residual stream, the carry for the next MoE layer, and the router's raw statistics."""
        routing, carry, stats = self.router(x_TD, carry, context)
        y_TD = self.experts(x_TD, *routing.ffn_view())
        if self.zero_compute is not None:
            y_TD = y_TD + self.zero_compute(x_TD, routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return y_TD, carry, stats
