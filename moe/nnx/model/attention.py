"""Grouped-query attention with rotary positions and optional query/key norm; twin of `moe.attention`.

Shapes: B batch, S positions, D model width, H heads, A = head width, C places of a cache.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array, lax

from ...parts.config import MoEConfig
from ..parts.dense import Linear, RMSNorm


def rotary_angles(position_BS: Array, head_dim: int, theta: float) -> tuple[Array, Array]:
    """Cosine and sine [B, S, 1, A] in float32 for rotary position embedding with half-split pairs."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = jnp.tile(position_BS[..., None].astype(jnp.float32) * frequency, 2)
    return jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]


def rotate(x_BSHA: Array, cos: Array, sin: Array) -> Array:
    """Apply rotary angles to queries or keys."""
    first, second = jnp.split(x_BSHA, 2, axis=-1)
    turned = jnp.concatenate((-second, first), axis=-1)
    return x_BSHA * cos.astype(x_BSHA.dtype) + turned * sin.astype(x_BSHA.dtype)


class LayerKeys:
    """Keys and values of one layer, with room for all positions that a text may get; twin of `moe.parts.KeyValues`.

    It changes while a function is traced, as the arrays that it holds cannot.

    Args:
        key_BCHA, value_BCHA: of earlier calls, then room; None for none, of the first call.
        start: place of this call's first position.
        mask_BSC: which places this call's positions may look at.
    """

    def __init__(self, key_BCHA: Array | None, value_BCHA: Array | None, start: Array | int, mask_BSC: Array) -> None:
        self.key_BCHA, self.value_BCHA, self.start, self.mask_BSC = key_BCHA, value_BCHA, start, mask_BSC

    def update(self, key_BSHA: Array, value_BSHA: Array) -> tuple[Array, Array]:
        """Write this call's keys and values; all that there are."""
        if self.key_BCHA is None or self.value_BCHA is None:
            room = ((0, 0), (0, self.mask_BSC.shape[2] - key_BSHA.shape[1]), (0, 0), (0, 0))
            self.key_BCHA, self.value_BCHA = jnp.pad(key_BSHA, room), jnp.pad(value_BSHA, room)
        else:
            place = (0, self.start, 0, 0)
            self.key_BCHA = lax.dynamic_update_slice(self.key_BCHA, key_BSHA, place)
            self.value_BCHA = lax.dynamic_update_slice(self.value_BCHA, value_BSHA, place)
        return self.key_BCHA, self.value_BCHA


class Attention(nnx.Module):
    """Causal self-attention of one decoder layer.

    Args:
        rngs: random streams; `params` draws the initial weights.
    """

    def __init__(self, config: MoEConfig, rngs: nnx.Rngs) -> None:
        self.head_dim, self.norms_heads = config.head_dim, config.qk_norm == "head"
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        width, std = config.hidden_size, config.initializer_range
        self.q_proj = Linear(width, query_width, std, rngs, config.qkv_bias)
        self.k_proj = Linear(width, key_width, std, rngs, config.qkv_bias)
        self.v_proj = Linear(width, key_width, std, rngs, config.qkv_bias)
        self.o_proj = Linear(query_width, width, std, rngs)
        widths = (config.head_dim, config.head_dim) if self.norms_heads else (query_width, key_width)
        norms = [None if config.qk_norm == "none" else RMSNorm(width, config.rms_norm_eps) for width in widths]
        self.q_norm, self.k_norm = norms

    def __call__(
        self,
        x_BSD: Array,
        angles: tuple[Array, Array],
        is_valid_BS: Array | None,
        cache: LayerKeys | None = None,
    ) -> Array:
        """[B, S, D]; with a cache its mask says who sees what, else causality and `is_valid_BS` do."""
        query = rotate(self._normed_heads(self.q_proj(x_BSD), self.q_norm), *angles)
        key = rotate(self._normed_heads(self.k_proj(x_BSD), self.k_norm), *angles)
        value = self._heads(self.v_proj(x_BSD)).astype(query.dtype)
        mask, is_causal = None if is_valid_BS is None else is_valid_BS[:, None, None, :], True
        if cache is not None:
            key, value = cache.update(key, value)
            mask, is_causal = cache.mask_BSC[:, None], False
        scale = self.head_dim**-0.5
        y_BSHA = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=is_causal, scale=scale)
        return self.o_proj(rearrange(y_BSHA, "b s h a -> b s (h a)"))

    def _normed_heads(self, x: Array, norm: RMSNorm | None) -> Array:
        if norm is None:
            return self._heads(x)
        return norm(self._heads(x)) if self.norms_heads else self._heads(norm(x))

    def _heads(self, x: Array) -> Array:
        return rearrange(x, "b s (h a) -> b s h a", a=self.head_dim)
