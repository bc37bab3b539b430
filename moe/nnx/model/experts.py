"""Experts: the weights of one layer's gated experts and how they are computed, on one device or over a mesh.

Shapes: T tokens, K slots, N = T * K rows, E experts, D model width, F expert width.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ...parts.config import MoEConfig
from ..parts.dense import activation, normal
from ..parts.grouped import GROUPED_PRODUCTS, default_product
from ..parts.mesh import AXES, partition
from ..parts.sorting import sort_by_expert, sort_tokens, unsort_rows

Activation = Callable[[Array], Array]


class Experts(nnx.Module):
    """E gated feed-forward networks.

    `gate_up_proj` is [E, D, 2, F], gate before up, so that both halves can be split over devices along F alike;
    `down_proj` is [E, F, D].

    Args:
        config: gives E, D, F and the activation.
        rngs: random streams; `params` draws the initial weights.
        product: a key of `grouped.GROUPED_PRODUCTS`; None takes the platform's default.

    Attributes:
        mesh: devices that share the experts, or None; set by `distribute.distribute`.
    """

    def __init__(self, config: MoEConfig, rngs: nnx.Rngs, product: str | None = None) -> None:
        if product is not None and product not in GROUPED_PRODUCTS:
            raise ValueError(f"experts are computed by one of {', '.join(GROUPED_PRODUCTS)}; got {product!r}")
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = normal(rngs, (E, D, 2, F), config.initializer_range)
        self.down_proj = normal(rngs, (E, F, D), config.initializer_range)
        self.act, self.product = activation(config.hidden_act), product
        self.mesh: Mesh | None = None

    def __call__(self, x_TD: Array, expert_TK: Array, weight_TK: Array) -> Array:
        """[T, D]: the weighted sum over each token's experts; ids >= E contribute nothing."""
        weights = self.gate_up_proj[...], self.down_proj[...]
        platform = None if self.mesh is None else self.mesh.devices.flat[0].platform
        compute = partial(compute_experts, act=self.act, product=self.product or default_product(platform))
        if self.mesh is None:
            return compute(x_TD, expert_TK, weight_TK, *weights)
        return _over_mesh(compute, self.mesh, x_TD, expert_TK, weight_TK, *weights)


def compute_experts(
    x_TD: Array,
    expert_TK: Array,
    weight_TK: Array,
    gate_up_proj: Array,
    down_proj: Array,
    *,
    act: Activation = jax.nn.silu,
    product: str | None = None,
) -> Array:
    """Weighted sum of gated experts, computed in the dtype of their weights.

    Args:
        x_TD: tokens; their dtype is that of the result.
        expert_TK: integer ids; ids >= E contribute nothing.
        weight_TK: floating-point combine weights; no normalisation is assumed.
        gate_up_proj: [E, D, 2, F], gate before up.
        down_proj: [E, F, D], as right factors of a product.
        act: activation of the gate, element by element.
        product: a key of `grouped.GROUPED_PRODUCTS`; None takes the platform's default.

    Returns:
        [T, D] in the dtype of `x_TD`.
    """
    multiply = GROUPED_PRODUCTS[product or default_product()]
    E, D, _, F = gate_up_proj.shape
    order = sort_by_expert(expert_TK, E)
    x_ND = sort_tokens(x_TD.astype(gate_up_proj.dtype), order)
    gate_up = multiply(x_ND, gate_up_proj.reshape(E, D, 2 * F), order.count_E)
    hidden_NF = act(gate_up[:, :F]) * gate_up[:, F:]
    y_TKD = unsort_rows(multiply(hidden_NF, down_proj, order.count_E), order, x_TD.shape[0])
    return (y_TKD * weight_TK[..., None]).sum(axis=1).astype(x_TD.dtype)


def _over_mesh(
    compute: Callable[..., Array],
    mesh: Mesh,
    x_TD: Array,
    expert_TK: Array,
    weight_TK: Array,
    gate_up_proj: Array,
    down_proj: Array,
) -> Array:
    """Expert parallelism: every device computes the rows of its own experts, and the sum over devices is the output.

    Tokens are split over `data` only, experts over `expert`, each expert's width over `tensor`.
    """

    tokens = P("data")
    splits = [partition(("experts", "gate_up_proj"), gate_up_proj.shape, mesh)]
    splits += [partition(("experts", "down_proj"), down_proj.shape, mesh)]
    is_width_split = splits[-1][1] is not None
    # over an axis that splits nothing every device does the same, and nothing is summed
    axes = AXES if is_width_split else ("data", "expert")
    splits = [tokens, tokens, tokens, *splits]

    def local(*arrays: Array) -> Array:
        # what is equal on several devices is made to differ before it meets what does; the transpose is the sum over
        # those devices that a gradient needs
        arrays = tuple(_varying(array, split, axes) for array, split in zip(arrays, splits, strict=True))
        x_TD, expert_TK, weight_TK, gate_up_proj, down_proj = arrays
        E = gate_up_proj.shape[0]
        mine_TK = expert_TK - lax.axis_index("expert") * E
        mine_TK = jnp.where((mine_TK >= 0) & (mine_TK < E), mine_TK, E)
        y_TD = compute(x_TD, mine_TK, weight_TK, gate_up_proj, down_proj)
        return lax.psum(y_TD, ("expert", "tensor") if is_width_split else "expert")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=tuple(splits), out_specs=tokens)
    return mapped(x_TD, expert_TK, weight_TK, gate_up_proj, down_proj)


def _varying(array: Array, split: P, axes: tuple[str, ...]) -> Array:
    """The same array, typed as different on all devices along `axes`."""
    return lax.pcast(array, tuple(axis for axis in axes if axis not in split), to="varying")
