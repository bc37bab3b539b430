"""Dense pieces: matrix product, norm, plain feed-forward, and how fresh weights are drawn.

Shapes: D model width, F inner width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The activation that transformers knows under this name.

    Raises:
        ValueError: if there is no twin of it here.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act must be one of {', '.join(ACTIVATIONS)} in JAX; got {name!r}")
    return ACTIVATIONS[name]


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 parameter, normally distributed around 0."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class Linear(nnx.Module):
    """A matrix product, computed in the dtype of its weights.

    Args:
        width, out_width: of input and output; `kernel` is [width, out_width].
        std: of the initial weights.
        rngs: random streams; `params` draws the initial weights.
        has_bias: whether a bias [out_width], zero at first, is added.
    """

    def __init__(self, width: int, out_width: int, std: float, rngs: nnx.Rngs, has_bias: bool = False) -> None:
        self.kernel = normal(rngs, (width, out_width), std)
        self.bias = nnx.Param(jnp.zeros(out_width, jnp.float32)) if has_bias else None

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...]
        y = x.astype(kernel.dtype) @ kernel
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dimension. Source: Zhang and Sennrich 2019, arXiv:1910.07467, eq. 4."""

    def __init__(self, width: int, eps: float) -> None:
        self.weight = nnx.Param(jnp.ones(width, jnp.float32))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.eps)
        return (normed * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class FeedForward(nnx.Module):
    """A plain gated feed-forward network, for dense layers and shared experts.

    Args:
        width: D, the width of tokens in and out.
        inner_width: F, the hidden width.
        act: name of the gate's activation.
        std: of the initial weights.
        rngs: random streams; `params` draws the initial weights.
    """

    def __init__(self, width: int, inner_width: int, act: str, std: float, rngs: nnx.Rngs) -> None:
        self.gate_proj = Linear(width, inner_width, std, rngs)
        self.up_proj = Linear(width, inner_width, std, rngs)
        self.down_proj = Linear(inner_width, width, std, rngs)
        self.act = activation(act)

    def __call__(self, x: Array) -> Array:
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
