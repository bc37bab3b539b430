"""Rows sorted by expert and back again, with gathers in both directions of differentiation.

The transpose of a gather is a scatter-add, which is slow everywhere; here the inverse permutation is at hand, so the
backward passes below gather as well.

Shapes: T tokens, K slots, N = T * K rows, D model width, E experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from jax import Array, lax


class Order(NamedTuple):
    """How N = T * K routed rows are sorted by expert.

    Args:
        row_N: for each sorted place, the row `t * K + k` that stands there.
        place_N: for each row, its sorted place; the inverse permutation.
        count_E: rows of each expert; rows with ids >= E stand behind all others.
    """

    row_N: Array
    place_N: Array
    count_E: Array


def sort_by_expert(expert_TK: Array, num_experts: int) -> Order:
    """Stable order of the routed rows by expert id.

    By `lax.sort` with an index operand: inside `shard_map` jax types what `argsort` returns as equal on all devices,
    and gradients then lose a sum over devices without a word.
    """
    id_N = expert_TK.reshape(-1)
    row_N = _iota_like(id_N)
    _, row_N = lax.sort((id_N, row_N), num_keys=1, is_stable=True)
    _, place_N = lax.sort((row_N, _iota_like(id_N)), num_keys=1)
    count_E = (id_N[:, None] == jnp.arange(num_experts)).sum(axis=0, dtype=jnp.int32)
    return Order(row_N, place_N, count_E)


@jax.custom_vjp
def sort_tokens(x_TD: Array, order: Order) -> Array:
    """[N, D]: each token once per slot, in sorted order."""
    top_k = order.row_N.shape[0] // x_TD.shape[0]
    return x_TD[order.row_N // top_k]


def _sort_tokens_forward(x_TD: Array, order: Order) -> tuple[Array, tuple[Order, int]]:
    return sort_tokens(x_TD, order), (order, x_TD.shape[0])


def _sort_tokens_backward(saved: tuple[Order, int], dx_ND: Array) -> tuple[Array, None]:
    order, num_tokens = saved
    return reduce(dx_ND[order.place_N], "(t k) d -> t d", "sum", t=num_tokens), None


sort_tokens.defvjp(_sort_tokens_forward, _sort_tokens_backward)


@jax.custom_vjp
def _unsort_rows(y_ND: Array, order: Order) -> Array:
    return y_ND[order.place_N]


_unsort_rows.defvjp(
    lambda y_ND, order: (_unsort_rows(y_ND, order), order),
    lambda order, dy_ND: (dy_ND[order.row_N], None),
)


def unsort_rows(y_ND: Array, order: Order, num_tokens: int) -> Array:
    """[T, K, D]: sorted rows back at their token and slot."""
    return rearrange(_unsort_rows(y_ND, order), "(t k) d -> t k d", t=num_tokens)


def _iota_like(id_N: Array) -> Array:
    # a sum with zeros of id_N, so that inside shard_map it varies over the same devices
    return jnp.arange(id_N.shape[0], dtype=jnp.int32) + jnp.zeros_like(id_N, dtype=jnp.int32)
