"""What goes into a router and comes out of it, as pytrees; the twins of `routing`'s classes of the same names.

The one difference: shapes are static under `jit`, so padding tokens stay in the statistics' arrays and are masked out
of every mean and count.

Shapes: T tokens, K slots per token, E FFN experts, Z zero-compute experts, R = E + Z routable experts.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import Array

Carry = dict[str, Any]


@partial(jax.tree_util.register_dataclass, data_fields=["expert_TK", "weight_TK"], meta_fields=["E", "Z"])
@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """Where T tokens go at one MoE layer.

    Args:
        expert_TK: int32 ids. `0..E-1` are FFN experts, `E..E+Z-1` zero-compute experts, `E+Z` an empty slot.
        weight_TK: float32 combine weights; 0 in empty slots.
        E: number of FFN experts, ids 0..E-1.
        Z: number of zero-compute experts, ids E..E+Z-1.
    """

    expert_TK: Array
    weight_TK: Array
    E: int
    Z: int = 0

    @property
    def num_routable(self) -> int:
        """R."""
        return self.E + self.Z

    @property
    def empty_id(self) -> int:
        """The id of an empty slot."""
        return self.E + self.Z

    @property
    def count_R(self) -> Array:
        """int32 slots per routable expert, empty slots left out."""
        return (self.expert_TK.reshape(-1, 1) == jnp.arange(self.num_routable)).sum(axis=0, dtype=jnp.int32)

    def ffn_view(self) -> tuple[Array, Array]:
        """Ids with E for every slot that no FFN expert computes, and weights with 0 there."""
        is_ffn_TK = self.expert_TK < self.E
        return jnp.minimum(self.expert_TK, self.E), jnp.where(is_ffn_TK, self.weight_TK, 0.0)

    def drop(self, is_dropped_TK: Array) -> Self:
        """The same routing with some slots emptied."""
        return replace(
            self,
            expert_TK=jnp.where(is_dropped_TK, self.empty_id, self.expert_TK),
            weight_TK=jnp.where(is_dropped_TK, 0.0, self.weight_TK),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingContext:
    """What a router may look at besides the token's hidden state; the same for all layers of a forward pass.

    Args:
        is_training: whether capacity limits, noise and the like apply.
        batch_size: B, sequences among the T tokens.
        is_valid_T: False for padding; None when no token is padding.
        key: random key of this forward pass, for routers with noise.
    """

    is_training: bool
    batch_size: int
    is_valid_T: Array | None = None
    key: Array | None = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["probability_TR", "logit_TR", "chosen", "kept", "is_valid_T", "target_share_R", "penalty"],
    meta_fields=["batch_size", "balance_loss"],
)
@dataclass(frozen=True, kw_only=True, eq=False)
class RouterStats:
    """The raw quantities of one router call; losses and their weights live in `losses`.

    Args:
        probability_TR: the distribution that balance losses see.
        logit_TR: logits before softmax or sigmoid, for the z-loss.
        chosen: what the router chose, before any capacity drop; padding tokens have empty slots.
        kept: what is left after capacity drops, and is computed.
        is_valid_T: False for padding; None when no token is padding.
        target_share_R: the load shares that the balance loss aims at; None means uniform.
        batch_size: B, sequences among the T tokens.
        balance_loss: the name in `losses.BALANCE_LOSSES` of the loss that the router is trained with.
        penalty: a loss that the router weighs itself, or None.
    """

    probability_TR: Array
    logit_TR: Array
    chosen: Routing
    kept: Routing
    is_valid_T: Array | None
    target_share_R: Array | None
    batch_size: int
    balance_loss: str
    penalty: Array | None = None

    @property
    def probability_R(self) -> Array:
        """Mean router probability per routable expert."""
        return self.mean_of_valid(self.probability_TR)

    @property
    def entropy(self) -> Array:
        """Mean entropy of the router's distribution in nats."""
        return self.mean_of_valid(jax.scipy.special.entr(self.probability_TR).sum(axis=-1))

    def mean_of_valid(self, x: Array) -> Array:
        """Mean over the valid tokens, which are the first axis."""
        if self.is_valid_T is None:
            return x.mean(axis=0)
        valid = self.is_valid_T.reshape(-1, *[1] * (x.ndim - 1))
        return jnp.where(valid, x, 0.0).sum(axis=0) / jnp.maximum(self.is_valid_T.sum(), 1)
