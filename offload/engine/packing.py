"""Attention of a packed step: each row attends to the keys and values of its own sequence.

The attention function of this module hands each sequence's rows, with its own cache, to the model's ordinary function,
in the shapes that they would have alone. Most families call it with the keys of the new rows; those that cache a latent
and expand it afterwards (multi-head latent attention) call it with the keys of all sequences behind each other.

Shapes: N rows of a step.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .kept.cached import CachedTokens

ATTENTION = "expertier_sequences"


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """What one sequence computes in a step.

    Args:
        cached: the tokens before; `token_ids` are added to it.
        token_ids: new tokens, at least one.
        num_logits: logits of so many of the last new tokens are wanted.
        by_row: each new token attends by a product of its own, as in decoding; otherwise all at once, as in a prefill.
    """

    cached: CachedTokens
    token_ids: Sequence[int]
    num_logits: int = 1
    by_row: bool = False

    @property
    def is_one_call(self) -> bool:
        return not self.by_row or len(self.token_ids) == 1


class PackedAttention:
    """The sequences of a packed step, as its attention layers see them.

    Args:
        pieces: in the order of their rows.
        attention: name of the model's ordinary attention.
    """

    def __init__(self, pieces: Sequence[Piece], attention: str) -> None:
        self._attention = attention
        self._calls = list(_calls(pieces))
        self._masks: dict[tuple[int, int, int, int], Any] = {}
        self._joined: dict[int, list[tuple[int, Any]]] = {}
        self.num_calls = 0
        """Layers that have attended; 0 after a step says that the model does not ask the attention interface."""

    def attend(self, module: Any, states: Sequence[torch.Tensor], options: dict[str, Any]) -> torch.Tensor:
        """Outputs of all rows, each of attention over its own sequence."""
        self.num_calls += 1
        query, key, value = states
        joined = self._joined.pop(module.layer_idx, None)
        outputs, first = [], 0
        for number, (piece, rows) in enumerate(self._calls):
            part = query[:, :, rows]
            if joined is None:
                layer = piece.cached.cache.layers[module.layer_idx]
                mask = self._mask(module.config, layer, part)
                keys, values = layer.update(key[:, :, rows], value[:, :, rows])
            else:
                length, mask = joined[number]
                keys, values = key[:, :, first : first + length], value[:, :, first : first + length]
                first += length
            outputs.append(self._ordinary(module)(module, part, keys, values, mask, **options)[0])
        return torch.cat(outputs, dim=1)

    def join(self, config: Any, states: Sequence[torch.Tensor], layer_idx: int) -> list[torch.Tensor]:
        """What a cache gives: the keys and values of all sequences behind each other, new rows included."""
        kept: list[Sequence[torch.Tensor]] = []
        lengths: list[tuple[int, Any]] = []
        for piece, rows in self._calls:
            layer = piece.cached.cache.layers[layer_idx]
            mask = self._mask(config, layer, states[0][:, :, rows])
            kept.append(layer.update(*(state[:, :, rows] for state in states)))
            lengths.append((kept[-1][0].shape[2], mask))
        self._joined[layer_idx] = lengths
        return [torch.cat(parts, dim=2) for parts in zip(*kept, strict=True)]

    def _ordinary(self, module: Any) -> Any:
        own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(self._attention, own)

    def _mask(self, config: Any, layer: Any, rows: torch.Tensor) -> Any:
        """The mask that transformers makes for these rows alone; a single row sees all keys that its layer keeps."""
        length = rows.shape[2]
        if length == 1:
            return None
        past, (kv_length, kv_offset) = layer.get_seq_length(), layer.get_mask_sizes(length)
        window = int(layer.sliding_window) if layer.is_sliding else 0
        key = (length, past, kv_length, window)
        if key not in self._masks:
            self._masks[key] = ALL_MASK_ATTENTION_FUNCTIONS[self._attention](
                batch_size=1,
                q_length=length,
                kv_length=kv_length,
                q_offset=past,
                kv_offset=kv_offset,
                mask_function=sliding_window_causal_mask_function(window) if window else causal_mask_function,
                attention_mask=None,
                allow_is_causal_skip=True,
                local_size=window or None,
                dtype=rows.dtype,
                config=config,
                device=rows.device,
                use_vmap=False,
            )
        return self._masks[key]


class JoinedCache(DynamicCache):  # type: ignore[misc]
    """The cache that a packed step gives to a model which expands what it cached.

    Args:
        packed: whose sequences it joins.
        config: the model's.
    """

    def __init__(self, packed: PackedAttention, config: Any) -> None:
        super().__init__(config=config)
        self._packed, self._config = packed, config.get_text_config()

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any) -> Any:
        return tuple(self._packed.join(self._config, (key_states, value_states), layer_idx))


_current: ContextVar[PackedAttention | None] = ContextVar("packed_step", default=None)


@contextmanager
def attending(packed: PackedAttention, configs: Sequence[Any]) -> Iterator[None]:
    """Within, models with these configs attend by `packed`; afterwards by what they did before."""
    before = [config._attn_implementation_internal for config in configs]
    token = _current.set(packed)
    for config in configs:
        config._attn_implementation_internal = ATTENTION
    try:
        yield
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation_internal = name
        _current.reset(token)


def _attend_packed(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of a packed step, in transformers' attention interface."""
    packed = _current.get()
    if packed is None:
        raise RuntimeError(f'attention "{ATTENTION}" runs within a packed step of the engine only')
    return packed.attend(module, (query, key, value), options), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend_packed)


def _calls(pieces: Sequence[Piece]) -> Iterator[tuple[Piece, slice]]:
    """The calls of attention of one layer: a sequence, and the rows of the step that attend together."""
    first = 0
    for piece in pieces:
        length = len(piece.token_ids)
        width = 1 if piece.by_row else length
        yield from ((piece, slice(start, start + width)) for start in range(first, first + length, width))
        first += length
