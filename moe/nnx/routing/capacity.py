"""Capacity: how many tokens an expert may take, and which of them it keeps; twin of `routing.losses.capacity`.

Shapes: T tokens, K slots per token, N = T * K rows in slot-major order, R routable experts.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from .assignment import Routing


def first(routing: Routing, key: Array | None) -> Array:
    """First come, first served; second choices queue last."""
    return jnp.zeros_like(routing.weight_TK)


def priority(routing: Routing, key: Array | None) -> Array:
    """First choices before second ones; within a choice, tokens by their largest weight."""
    T, K = routing.weight_TK.shape
    iota_T = jnp.arange(T)
    _, order_T = lax.sort((-lax.stop_gradient(routing.weight_TK).max(axis=-1), iota_T), num_keys=1, is_stable=True)
    place_T = jnp.zeros_like(order_T).at[order_T].set(iota_T)
    return -(jnp.arange(K) * T + place_T[:, None])


def weight(routing: Routing, key: Array | None) -> Array:
    """Whatever choice it is, the largest weights stay."""
    return lax.stop_gradient(routing.weight_TK)


def random(routing: Routing, key: Array | None) -> Array:
    """A random subset stays."""
    if key is None:
        raise ValueError("capacity_policy 'random' draws numbers in training; give the model a key")
    return jax.random.uniform(key, routing.weight_TK.shape)


CAPACITY_POLICIES: dict[str, Callable[[Routing, Array | None], Array]] = {
    "first": first,
    "priority": priority,
    "weight": weight,
    "random": random,
}


def share_capacity_R(factor: float, num_slots: Array | int, share_R: np.ndarray) -> Array:
    """int32 `ceil(factor * num_slots * share)` per routable expert."""
    if isinstance(num_slots, int):
        return jnp.asarray(np.ceil(share_R * num_slots * factor - 1e-6).astype(np.int32))
    exact_R = jnp.asarray(share_R * factor, jnp.float32) * num_slots
    # as in torch's double precision, a product meant to be whole must not be rounded up
    return jnp.ceil(exact_R - jnp.maximum(1e-6, exact_R * 2.0**-22)).astype(jnp.int32)


def tutel_capacity(factor: float, *, count_R: Array, num_tokens: Array | int, top_k: int) -> Array:
    """Tokens per expert by Tutel's dynamic rule; see `routing.losses.capacity.tutel_capacity`."""
    if factor == 0:
        return count_R.max()
    per_expert = jnp.ceil(num_tokens / count_R.shape[0])
    fixed = top_k * jnp.floor(math.fabs(factor) * per_expert).astype(jnp.int32)
    return fixed if factor > 0 else jnp.minimum(count_R.max(), fixed)


def limit_capacity(routing: Routing, capacity: Array, rank_TK: Array) -> Routing:
    """Empty the slots that overflow an expert's capacity.

    Args:
        routing: the routing as chosen.
        capacity: tokens that one expert may take: a scalar, or one number per routable expert.
        rank_TK: larger stays first, ties go to the earlier row.
    """
    expert_N = routing.expert_TK.T.reshape(-1)
    iota_N = jnp.arange(expert_N.shape[0])
    sorted_N, _, row_N = lax.sort((expert_N, -rank_TK.T.reshape(-1), iota_N), num_keys=2, is_stable=True)
    count = jnp.append(routing.count_R, 0)
    start = jnp.cumsum(count) - count
    limit = jnp.append(jnp.broadcast_to(capacity, routing.num_routable), 0)
    is_over_N = iota_N - start[sorted_N] >= limit[sorted_N]
    is_over_N = jnp.zeros_like(is_over_N).at[row_N].set(is_over_N)
    return routing.drop(is_over_N.reshape(routing.expert_TK.shape[::-1]).T)
