"""Grouped matrix products: sorted rows, each multiplied by its own expert's matrix, without dropping any.

`ragged` is XLA's own, made for TPUs; on CPUs it multiplies every row by every expert. `block` walks over blocks of
rows of one expert each.

Shapes: N rows sorted by expert, D and F input and output width, E experts.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

GroupedProduct = Callable[[Array, Array, Array], Array]

# rows per block: small ones make more steps of the loop, large ones compute more rows in vain. Both were in use for the
# record 2026-11-21_flax-twin (two CPU cores), which has no other values; not tried on a GPU or TPU
MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 16, 128


def ragged_product(x_ND: Array, weight_EDF: Array, count_E: Array) -> Array:
    """[N, F] by `jax.lax.ragged_dot`; rows behind the last expert's are 0."""
    return lax.ragged_dot(x_ND, weight_EDF, count_E)


@jax.custom_vjp
def block_product(x_ND: Array, weight_EDF: Array, count_E: Array) -> Array:
    """[N, F] by a loop over blocks of rows; rows behind the last expert's are 0.

    The loop runs as often as there are blocks with rows, so an expert without rows costs nothing.
    """
    return _product(x_ND, weight_EDF, count_E, contracted=0)


def _block_forward(x_ND: Array, weight_EDF: Array, count_E: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return block_product(x_ND, weight_EDF, count_E), (x_ND, weight_EDF, count_E)


def _block_backward(saved: tuple[Array, Array, Array], dy_NF: Array) -> tuple[Array, Array, None]:
    x_ND, weight_EDF, count_E = saved
    dx_ND = _product(dy_NF, weight_EDF, count_E, contracted=1)
    return dx_ND, _weight_gradient(x_ND, dy_NF, count_E).astype(weight_EDF.dtype), None


block_product.defvjp(_block_forward, _block_backward)

GROUPED_PRODUCTS: dict[str, GroupedProduct] = {"ragged": ragged_product, "block": block_product}


def default_product(platform: str | None = None) -> str:
    """The faster of `GROUPED_PRODUCTS` on a platform (`cpu`, `gpu`, `tpu`), by default the one that jax runs on."""
    return "ragged" if (platform or jax.default_backend()) == "tpu" else "block"


def block_rows(num_rows: int, num_experts: int) -> int:
    """Rows per block: a power of two near half of an expert's mean share, so that little is padded."""
    share = max(1, num_rows // (2 * num_experts))
    return min(MAX_BLOCK_ROWS, max(MIN_BLOCK_ROWS, 1 << (share - 1).bit_length()))


def _product(x_ND: Array, weight_EDF: Array, count_E: Array, *, contracted: int) -> Array:
    """Rows times each expert's matrix, summed over the matrix's axis `contracted`.

    A block that runs past its expert's rows writes rows of the next one, which overwrites them later.
    """
    num_rows, rows = x_ND.shape[0], block_rows(x_ND.shape[0], weight_EDF.shape[0])
    x_ND = jnp.pad(x_ND, ((0, rows), (0, 0)))
    y_ND = jnp.zeros_like(x_ND, shape=(num_rows + rows, weight_EDF.shape[2 - contracted]))
    offset_E = jnp.cumsum(count_E) - count_E

    def expert(index: Array, y_ND: Array) -> Array:
        weight = lax.dynamic_index_in_dim(weight_EDF, index, keepdims=False)

        def block(number: Array, y_ND: Array) -> Array:
            start = offset_E[index] + number * rows
            left = lax.dynamic_slice_in_dim(x_ND, start, rows)
            y = lax.dot_general(left, weight, (((1,), (contracted,)), ((), ())))
            return lax.dynamic_update_slice_in_dim(y_ND, y.astype(y_ND.dtype), start, 0)

        return lax.fori_loop(0, -(-count_E[index] // rows), block, y_ND)

    y_ND = lax.fori_loop(0, weight_EDF.shape[0], expert, y_ND)[:num_rows]
    return jnp.where(jnp.arange(num_rows)[:, None] < count_E.sum(), y_ND, 0)


def _weight_gradient(x_ND: Array, dy_NF: Array, count_E: Array) -> Array:
    """float32 [E, D, F]: each expert's rows of `x`, transposed, times its rows of `dy`."""
    num_experts = count_E.shape[0]
    rows = block_rows(x_ND.shape[0], num_experts)
    x_ND, dy_NF = (jnp.pad(array, ((0, rows), (0, 0))) for array in (x_ND, dy_NF))
    shape = (x_ND.shape[1], dy_NF.shape[1])
    zeros = partial(jnp.zeros_like, dy_NF, dtype=jnp.float32)  # inside shard_map, of the varying type of dy_NF
    offset_E = jnp.cumsum(count_E) - count_E

    def expert(index: Array, gradient_EDF: Array) -> Array:
        def block(number: Array, gradient: Array) -> Array:
            start = offset_E[index] + number * rows
            is_mine = (jnp.arange(rows) < count_E[index] - number * rows)[:, None]
            left = jnp.where(is_mine, lax.dynamic_slice_in_dim(x_ND, start, rows), 0)
            right = lax.dynamic_slice_in_dim(dy_NF, start, rows)
            product = partial(lax.dot_general, preferred_element_type=jnp.float32)
            return gradient + product(left, right, (((0,), (0,)), ((), ())))

        gradient = lax.fori_loop(0, -(-count_E[index] // rows), block, zeros(shape=shape))
        return lax.dynamic_update_index_in_dim(gradient_EDF, gradient, index, 0)

    return lax.fori_loop(0, num_experts, expert, zeros(shape=(num_experts, *shape)))
