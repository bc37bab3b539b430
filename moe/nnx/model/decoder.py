"""The decoder language model in Flax NNX; twin of `moe.decoder`.

Shapes: B batch, S positions, T = B * S tokens, D model width, V vocabulary, L MoE layers, R routable experts.
"""

import json
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from ...parts.config import MoEConfig
from ..parts.dense import FeedForward, Linear, RMSNorm, normal
from ..routing.assignment import Carry, RouterStats, RoutingContext
from ..routing.losses import auxiliary_loss
from ..routing.routers import build_twins, deciding_gates
from .attention import Attention, LayerKeys, rotary_angles
from .layer import MoELayer


class MoEOutput(NamedTuple):
    """What a forward pass returns.

    Args:
        logits: [B, S, V], unnormalised, for the next token.
        router_stats: one per MoE layer.
        loss: language-model loss plus, in training, weighted auxiliary losses; when labels are given.
        lm_loss: mean cross entropy per predicted token in nats, when labels are given.
    """

    logits: Array
    router_stats: list[RouterStats]
    loss: Array | None = None
    lm_loss: Array | None = None


class Embedding(nnx.Module):
    """Rows of a [V, D] table."""

    def __init__(self, num_rows: int, width: int, std: float, rngs: nnx.Rngs) -> None:
        self.weight = normal(rngs, (num_rows, width), std)

    def __call__(self, token_BS: Array) -> Array:
        return self.weight[...][token_BS]


class DecoderLayer(nnx.Module):
    """Pre-norm attention and feed-forward; `mlp` is a `MoELayer`, or a `FeedForward` in dense layers."""

    def __init__(self, config: MoEConfig, mlp: MoELayer | FeedForward, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def __call__(
        self,
        x_BSD: Array,
        angles: tuple[Array, Array],
        is_valid_BS: Array | None,
        carry: Carry,
        context: RoutingContext,
        cache: LayerKeys | None = None,
    ) -> tuple[Array, Carry, RouterStats | None]:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), angles, is_valid_BS, cache)
        normed_BSD = self.post_attention_layernorm(x_BSD)
        if isinstance(self.mlp, FeedForward):
            return x_BSD + self.mlp(normed_BSD), carry, None
        y_TD, carry, stats = self.mlp(rearrange(normed_BSD, "b s d -> (b s) d"), carry, context)
        return x_BSD + rearrange(y_TD, "(b s) d -> b s d", b=x_BSD.shape[0]), carry, stats


class MoEModel(nnx.Module):
    """Embedding, decoder layers and the final norm."""

    def __init__(self, config: MoEConfig, rngs: nnx.Rngs, product: str | None) -> None:
        width, std = config.hidden_size, config.initializer_range
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.embed_tokens = Embedding(config.vocab_size, width, std, rngs)
        dense = [
            FeedForward(width, config.intermediate_size, config.hidden_act, std, rngs)
            for _ in range(config.num_dense_layers)
        ]
        mlps = [*dense, *(MoELayer(config, router, rngs, product) for router in build_twins(config, rngs))]
        self.layers = nnx.List([DecoderLayer(config, mlp, rngs) for mlp in mlps])
        self.norm = RMSNorm(width, config.rms_norm_eps)

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The L layers with experts, first to last."""
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoELayer)]

    def __call__(
        self, token_BS: Array, is_valid_BS: Array | None, context: RoutingContext
    ) -> tuple[Array, list[RouterStats]]:
        """Final hidden states [B, S, D] and the routers' statistics."""
        position_BS = jnp.arange(token_BS.shape[1])[None]
        if is_valid_BS is not None:
            position_BS = jnp.maximum(jnp.cumsum(is_valid_BS, axis=1) - 1, 0)
        return self._through(token_BS, position_BS, is_valid_BS, context, [None] * len(self.layers))

    def extend(
        self, token_BS: Array, position_BS: Array, context: RoutingContext, cache_L: Sequence[LayerKeys]
    ) -> Array:
        """Final hidden states [B, S, D] of tokens after those in the caches, which take them up."""
        x_BSD, _ = self._through(token_BS, position_BS, None, context, cache_L)
        return x_BSD

    def _through(
        self,
        token_BS: Array,
        position_BS: Array,
        is_valid_BS: Array | None,
        context: RoutingContext,
        cache_L: Sequence[LayerKeys | None],
    ) -> tuple[Array, list[RouterStats]]:
        x_BSD = self.embed_tokens(token_BS)
        angles = rotary_angles(position_BS, self.head_dim, self.rope_theta)
        carry, all_stats = {}, []
        for layer, cache in zip(self.layers, cache_L, strict=True):
            x_BSD, carry, stats = layer(x_BSD, angles, is_valid_BS, carry, context, cache)
            if stats is not None:
                all_stats.append(stats)
        return self.norm(x_BSD), all_stats


class MoEForCausalLM(nnx.Module):
    """The decoder with its language-model head.

    Args:
        config: sizes, router and losses, as on the torch side.
        rngs: random streams for the initial weights.
        product: how experts are computed, `ragged` or `block`; None takes the platform's default.

    Raises:
        ValueError: if the router or the activation has no twin here.
    """

    def __init__(self, config: MoEConfig, rngs: nnx.Rngs, *, product: str | None = None) -> None:
        self.config_json = config.to_json_string(use_diff=False)  # jit needs attributes that hash; configs do not
        self.loss_weights = (config.balance_loss_weight, config.z_loss_weight)
        self.model = MoEModel(config, rngs, product)
        head = partial(Linear, config.hidden_size, config.vocab_size, config.initializer_range, rngs)
        self.lm_head = None if config.tie_word_embeddings else head()

    @property
    def config(self) -> MoEConfig:
        """The config that the model was built from."""
        return MoEConfig.from_dict(json.loads(self.config_json))

    def __call__(
        self,
        token_BS: Array,
        labels_BS: Array | None = None,
        *,
        attention_mask: Array | None = None,
        is_training: bool = False,
        key: Array | None = None,
    ) -> MoEOutput:
        """Logits, and the loss when labels are given.

        Args:
            token_BS: integer vocabulary ids.
            labels_BS: integer [B, S], the same tokens (the shift happens here); -100 is ignored.
            attention_mask: [B, S], 0 for padding.
            is_training: whether capacity limits, noise and auxiliary losses apply.
            key: random key, for routers with noise.
        """
        is_valid_BS = None if attention_mask is None else attention_mask.astype(bool)
        context = RoutingContext(
            is_training=is_training,
            batch_size=token_BS.shape[0],
            is_valid_T=None if is_valid_BS is None else is_valid_BS.reshape(-1),
            key=key,
        )
        x_BSD, stats = self.model(token_BS, is_valid_BS, context)
        logits = self.logits_of(x_BSD)
        if labels_BS is None:
            return MoEOutput(logits, stats)
        loss = lm_loss = cross_entropy(logits[:, :-1], labels_BS[:, 1:])
        if is_training:
            balance_weight, z_weight = self.loss_weights
            loss = lm_loss + auxiliary_loss(stats, balance_weight=balance_weight, z_weight=z_weight)
        return MoEOutput(logits, stats, loss, lm_loss)

    def post_step(self, count_LR: Array) -> None:
        """Tell every router that an optimiser step is done, with the step's choices per routable expert."""
        gates = deciding_gates([layer.router for layer in self.model.moe_layers])
        for gate, count_R in zip(gates, count_LR, strict=True):
            gate.post_step(count_R)

    def logits_of(self, x_BSD: Array) -> Array:
        """[B, S, V] of final hidden states."""
        if self.lm_head is not None:
            return self.lm_head(x_BSD)
        table_VD = self.model.embed_tokens.weight[...]
        return x_BSD.astype(table_VD.dtype) @ table_VD.T


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean over the labels that are not -100, in nats, computed in float32."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    nats = jax.nn.logsumexp(logits, axis=-1) - picked
    is_counted = labels != -100
    return jnp.where(is_counted, nats, 0.0).sum() / is_counted.sum()
