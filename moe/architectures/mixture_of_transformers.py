"""Mixture-of-Transformers: every weight but embedding, final norm and head belongs to a modality; attention is global.

Source: Liang et al. 2024, arXiv:2411.04996, section 2. Norms stand before the projections that they are for, per
modality; the released snippet puts them after and calls attention in a way that does not run.

Shapes: B batch, S positions, T = B * S tokens, D model width, E modalities.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from routing import Carry, ModalityRouter, RouterStats, RoutingContext, modality_of

from ..layers.layer import build_moe_layer
from ..layers.stack import StackInputs
from ..parts.attention import Attention, rotate
from ..parts.config import MoEConfig
from ..parts.norm import RMSNorm
from .body import Body


def mixture_of_transformers(config: MoEConfig, *, first_ids: list[int]) -> Body:
    """One expert per modality: `num_experts` modalities, K = 1, told apart by ranges of token ids.

    Raises:
        ValueError: if ranges and experts do not match, or there are dense layers.
    """
    if config.num_dense_layers:
        raise ValueError(f"all layers belong to modalities: num_dense_layers must be 0; got {config.num_dense_layers}")
    sizes = config.router_sizes
    routers = [ModalityRouter(sizes, layer, first_ids) for layer in range(sizes.num_layers)]
    return Body(
        layers=[build_moe_layer(config, router) for router in routers],
        decoder_layer=partial(ModalityDecoderLayer, first_ids=tuple(first_ids)),
    )


class ByModality(nn.Module):
    """The same kind of module once per modality; each row goes through its own.

    Args:
        num_modalities: E, copies of the module.
        make: makes one of them.
    """

    def __init__(self, num_modalities: int, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.of = nn.ModuleList(make() for _ in range(num_modalities))

    def forward(self, x: Tensor, modality_BS: Tensor) -> Tensor:
        """[B, S, ...]."""
        row_of = [torch.where(modality_BS == modality) for modality in range(len(self.of))]
        parts = [module(x[rows]) for module, rows in zip(self.of, row_of, strict=True)]
        y = x.new_empty(*modality_BS.shape, *parts[0].shape[1:], dtype=parts[0].dtype)
        for rows, part in zip(row_of, parts, strict=True):
            y = y.index_put(rows, part)
        return y


class ModalityAttention(Attention):
    """Attention over all tokens, with projections and query/key norms per modality."""

    def __init__(self, config: MoEConfig, layer_idx: int) -> None:
        if config.qkv_bias:
            raise ValueError("projections per modality have no biases; got qkv_bias=True")
        super().__init__(config, layer_idx)
        E = config.num_experts
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rows, columns = getattr(self, name).weight.shape
            setattr(self, name, ByModality(E, partial(nn.Linear, columns, rows, bias=False)))
        for name in ("q_norm", "k_norm"):
            norm = getattr(self, name)
            if isinstance(norm, RMSNorm):
                setattr(self, name, ByModality(E, partial(RMSNorm, norm.normalized_shape, eps=norm.eps)))

    def attend(self, x_BSD: Tensor, modality_BS: Tensor, inputs: StackInputs) -> Tensor:
        """[B, S, D]; appends this step's keys and values to the cache."""
        query = rotate(self._modal(x_BSD, self.q_proj, self.q_norm, modality_BS), *inputs.angles)
        key = rotate(self._modal(x_BSD, self.k_proj, self.k_norm, modality_BS), *inputs.angles)
        value = self._heads(self.v_proj(x_BSD, modality_BS))
        if inputs.cache is not None:
            key, value = inputs.cache.update(key, value, self.layer_idx)
        y_BSHA, _ = sdpa_attention_forward(self, query, key, value, inputs.mask, scaling=self.head_dim**-0.5)
        return self.o_proj(y_BSHA.flatten(2), modality_BS)

    def _modal(self, x_BSD: Tensor, project: nn.Module, norm: nn.Module, modality_BS: Tensor) -> Tensor:
        x = project(x_BSD, modality_BS)
        if not isinstance(norm, ByModality):
            return self._heads(x)
        if self.norms_heads:
            return norm(x.unflatten(-1, (-1, self.head_dim)), modality_BS).transpose(1, 2)
        return self._heads(norm(x, modality_BS))


class ModalityDecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward; only attention mixes modalities.

    Args:
        layer_idx: its place in the decoder.
        mlp: routed layer with one expert per modality.
        first_ids: the first token id of each modality.
    """

    def __init__(self, config: MoEConfig, layer_idx: int, mlp: nn.Module, first_ids: Sequence[int]) -> None:
        super().__init__()
        norm = partial(RMSNorm, config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm = ByModality(config.num_experts, norm)
        self.self_attn = ModalityAttention(config, layer_idx)
        self.post_attention_layernorm = ByModality(config.num_experts, norm)
        self.mlp = mlp
        self.first_ids = first_ids

    def forward(self, x_BSD: Tensor, carry: Carry, inputs: StackInputs) -> tuple[Tensor, Carry, list[RouterStats]]:
        modality_BS = self._modality(inputs.context, x_BSD)
        x_BSD = x_BSD + self.self_attn.attend(self.input_layernorm(x_BSD, modality_BS), modality_BS, inputs)
        normed_BSD = self.post_attention_layernorm(x_BSD, modality_BS)
        y_TD, carry, stats = self.mlp(normed_BSD.flatten(0, 1), carry, inputs.context)
        return x_BSD + y_TD.view_as(x_BSD), carry, stats

    def _modality(self, context: RoutingContext, x_BSD: Tensor) -> Tensor:
        return modality_of(context, self.first_ids).view(x_BSD.shape[:2])
