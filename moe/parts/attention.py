"""Grouped-query attention with rotary positions, optional query/key norm and a key/value cache.

Shapes: B batch, S positions, D model width, H heads (query or key/value), A = head width.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .config import MoEConfig
from .cpu_training import is_large_cpu_training
from .linear import Linear
from .norm import RMSNorm


def rotary_angles(position_BS: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine [B, 1, S, A] in float32 for rotary position embedding with half-split pairs.

    Source: Su et al. 2021 (RoFormer), arXiv:2104.09864, eq. 34; pairs (i, i + A/2) as in GPT-NeoX and Llama.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=position_BS.device, dtype=torch.float32) / head_dim)
    angle_BSA = torch.cat([position_BS[..., None].float() * frequency] * 2, dim=-1)
    return angle_BSA.cos()[:, None], angle_BSA.sin()[:, None]


def rotate(x_BHSA: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary angles to queries or keys."""
    cos, sin = cos.to(x_BHSA.dtype), sin.to(x_BHSA.dtype)
    if is_large_cpu_training(x_BHSA):
        return _Rotation.apply(x_BHSA, cos, sin)
    first, second = x_BHSA.chunk(2, dim=-1)
    return x_BHSA * cos + torch.cat((-second, first), dim=-1) * sin


class _Rotation(torch.autograd.Function):
    """Each pair turned where it lands, without the copies of a turned input; its gradient is turned back likewise."""

    @staticmethod
    def forward(ctx: Any, x_BHSA: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x_BHSA, cos, sin, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BHSA: Tensor) -> tuple[Tensor | None, ...]:
        return _turned(grad_BHSA, *ctx.saved_tensors, -1), None, None


def _turned(x_BHSA: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    y_BHSA = torch.empty_like(x_BHSA)
    half = x_BHSA.shape[-1] // 2
    first, second, cos, sin = x_BHSA[..., :half], x_BHSA[..., half:], cos[..., :half], sin[..., :half]
    torch.mul(first, cos, out=y_BHSA[..., :half]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=y_BHSA[..., half:]).addcmul_(first, sin, value=direction)
    return y_BHSA


class KeyValues(Protocol):
    """What attention needs of a cache; transformers' `Cache` is one."""

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append a call's keys and values; all that its queries may look at."""
        ...


class BorrowedKeys:
    """Keys and values that an earlier pass through the same layers computed; a pass that sees them computes none.

    Args:
        kept: keys and values [B, H, S, A] by index of the decoder layer.
    """

    def __init__(self, kept: dict[int, tuple[Tensor, Tensor]]) -> None:
        self.kept = kept


class Attention(nn.Module):
    """Causal self-attention of one decoder layer.

    Args:
        layer_idx: its place in the decoder, which is its place in the cache.
    """

    def __init__(self, config: MoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.is_causal = True
        self.norms_heads = config.qk_norm == "head"
        query_width = config.num_attention_heads * config.head_dim
        key_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_width, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, key_width, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, key_width, bias=config.qkv_bias)
        self.o_proj = Linear(query_width, config.hidden_size)
        if config.qk_norm == "none":
            self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        else:
            widths = (config.head_dim, config.head_dim) if self.norms_heads else (query_width, key_width)
            self.q_norm, self.k_norm = (RMSNorm(width, eps=config.rms_norm_eps) for width in widths)

    def forward(
        self,
        x_BSD: Tensor,
        angles: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KeyValues | BorrowedKeys | None,
    ) -> Tensor:
        """[B, S, D]; appends this step's keys and values to `cache`, or reads those that it lends."""
        query = rotate(self._normed_heads(self.q_proj(x_BSD), self.q_norm), *angles)
        key, value = self.keys_values(x_BSD, angles, cache)
        y_BSHA, _ = sdpa_attention_forward(self, query, key, value, mask, scaling=self.head_dim**-0.5)
        return self.o_proj(y_BSHA.flatten(2))

    def keys_values(
        self, x_BSD: Tensor, angles: tuple[Tensor, Tensor], cache: KeyValues | BorrowedKeys | None
    ) -> tuple[Tensor, Tensor]:
        """Rotated keys and values [B, H, S, A] that a query may look at, appended to `cache` or lent by it."""
        if isinstance(cache, BorrowedKeys):
            return cache.kept[self.layer_idx]
        key = rotate(self._normed_heads(self.k_proj(x_BSD), self.k_norm), *angles)
        value = self._heads(self.v_proj(x_BSD))
        return (key, value) if cache is None else cache.update(key, value, self.layer_idx)

    def _normed_heads(self, x: Tensor, norm: nn.Module) -> Tensor:
        if self.norms_heads:
            return norm(x.unflatten(-1, (-1, self.head_dim))).transpose(1, 2)
        return self._heads(norm(x))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
