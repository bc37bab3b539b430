"""Greedy generation: a prefill and a loop of single tokens over a cache of fixed size, compiled as one program.

Shapes: B batch, S positions of the prompt, C places of the cache, V vocabulary.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from ..routing.assignment import RoutingContext
from .attention import LayerKeys
from .decoder import MoEForCausalLM

NO_TOKEN = -1
"""Ends no answer."""


class _Text(NamedTuple):
    """What the loop carries.

    Args:
        token_BC: prompt and answer so far.
        is_valid_BC: False for padding and for places without a token yet.
        is_done_B: rows that have ended.
        length: places with tokens.
        keys, values: per decoder layer, [B, C, H, A]; None before the prompt has passed.
    """

    token_BC: Array
    is_valid_BC: Array
    is_done_B: Array
    length: Array
    keys: tuple[Array | None, ...]
    values: tuple[Array | None, ...]


def generate(
    model: MoEForCausalLM,
    token_BS: np.ndarray,
    *,
    max_new_tokens: int,
    attention_mask: np.ndarray | None = None,
    end_id: int | None = None,
    pad_id: int = 0,
) -> np.ndarray:
    """Continue texts by the likeliest token always; compiled once for each shape of prompt and number of tokens.

    Args:
        model: ours, in JAX.
        token_BS: integer prompts; shorter ones are padded before their first token.
        max_new_tokens: most tokens of an answer, at least 1.
        attention_mask: [B, S], 0 for padding; None has none.
        end_id: the token that ends an answer; None never does.
        pad_id: stands after the end of an answer while others go on.

    Returns:
        [B, S + N], prompts and answers, N the longest answer.

    Raises:
        ValueError: if there is no prompt, no token is asked for, or a prompt does not end with a token.
    """
    if max_new_tokens < 1 or not token_BS.size:
        raise ValueError(f"expected a prompt and at least 1 new token; got {token_BS.shape} and {max_new_tokens}")
    mask = np.ones(token_BS.shape, bool) if attention_mask is None else np.asarray(attention_mask).astype(bool)
    if mask.shape != token_BS.shape or not mask[:, -1].all():
        raise ValueError("prompts are padded before their first token: the mask must end with ones, in their shape")
    graph, state = nnx.split(model)
    ends = NO_TOKEN if end_id is None else end_id
    text = _continue(graph, state, token_BS.astype(np.int32), mask, max_new_tokens, ends, pad_id)
    return np.asarray(text.token_BC)[:, : int(text.length)]


@partial(jax.jit, static_argnums=(0, 4))
def _continue(
    graph: nnx.GraphDef,
    state: nnx.State,
    token_BS: Array,
    is_valid_BS: Array,
    count: int,
    end_id: Array,
    pad_id: Array,
) -> _Text:
    model: MoEForCausalLM = nnx.merge(graph, state)
    B, S = token_BS.shape
    room, empty = ((0, 0), (0, count)), (None,) * len(model.model.layers)
    text = _Text(
        token_BC=jnp.pad(token_BS, room, constant_values=pad_id),
        is_valid_BC=jnp.pad(is_valid_BS, room),
        is_done_B=jnp.zeros(B, bool),
        length=jnp.int32(S),
        keys=empty,
        values=empty,
    )
    text = _extended(model, text, 0, S, end_id, pad_id)
    return lax.while_loop(
        lambda text: (text.length < S + count) & ~text.is_done_B.all(),
        lambda text: _extended(model, text, text.length - 1, 1, end_id, pad_id),
        text,
    )


def _extended(
    model: MoEForCausalLM, text: _Text, start: Array | int, positions: int, end_id: Array, pad_id: Array
) -> _Text:
    """Compute the last positions that have tokens, from `start` on, and choose the token after them."""
    B, C = text.token_BC.shape
    token_BS = lax.dynamic_slice(text.token_BC, (0, start), (B, positions))
    is_valid_BS = lax.dynamic_slice(text.is_valid_BC, (0, start), (B, positions))
    position_BC = jnp.maximum(jnp.cumsum(text.is_valid_BC, axis=1) - 1, 0)
    position_BS = lax.dynamic_slice(position_BC, (0, start), (B, positions))
    is_earlier_SC = jnp.arange(C)[None] <= start + jnp.arange(positions)[:, None]
    mask_BSC = is_earlier_SC & text.is_valid_BC[:, None]
    cache_L = [LayerKeys(key, value, start, mask_BSC) for key, value in zip(text.keys, text.values, strict=True)]
    context = RoutingContext(is_training=False, batch_size=B, is_valid_T=is_valid_BS.reshape(-1), key=None)
    x_BSD = model.model.extend(token_BS, position_BS, context, cache_L)
    chosen_B = model.logits_of(x_BSD[:, -1:])[:, 0].argmax(axis=-1).astype(jnp.int32)
    chosen_B = jnp.where(text.is_done_B, pad_id, chosen_B)
    end = start + positions
    return _Text(
        token_BC=lax.dynamic_update_slice(text.token_BC, chosen_B[:, None], (0, end)),
        is_valid_BC=lax.dynamic_update_slice(text.is_valid_BC, ~text.is_done_B[:, None], (0, end)),
        is_done_B=text.is_done_B | (chosen_B == end_id),
        length=end + 1,
        keys=tuple(cache.key_BCHA for cache in cache_L),
        values=tuple(cache.value_BCHA for cache in cache_L),
    )
