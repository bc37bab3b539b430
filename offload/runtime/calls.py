"""Follows the calls of an offloaded model: a clock, the recorder's positions, the KV cache, the prefetcher's judgement.

Shapes: B sequences in a call, S positions of each.
"""

import threading
import time
from typing import Any

import numpy as np
import torch

from ..compute.kv_cache import grow_in_place
from ..ram.counters import total_ahead
from .runtime import OffloadRuntime

MOST_NESTED = 2
"""Calls within calls that are remembered. The engine makes one within another; what exceptions left behind goes."""


def follow_calls(model: Any, runtime: OffloadRuntime) -> None:
    """Give a model two hooks, one before each call and one after it; they stay as long as the model lives.

    An exception inside a call skips the second hook. Such a call is not counted, and the recorder leaves its routing
    out when the next call begins.

    Args:
        model: a model whose experts `runtime` computes.
        runtime: its counters, recorder and prefetcher hear of each call.
    """
    calls = _Calls(runtime)
    model.register_forward_pre_hook(calls.begin, with_kwargs=True)
    model.register_forward_hook(calls.end, with_kwargs=True)


class _Calls:
    """The hooks of one model; a copied model gets a clock of its own, because its hooks are copied with it."""

    def __init__(self, runtime: OffloadRuntime) -> None:
        self._runtime = runtime
        self._begun: dict[int, list[tuple[float, int]]] = {}
        """By thread, when each call began that is going on, and its S: the engine makes calls between two layers of
        another. Threads take turns in the layers, not in the calls."""

    # torch.compile would break the graph at the clock and trace the recorder's NumPy; so it leaves both hooks alone
    @torch.compiler.disable
    def begin(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch, num_tokens = _shape_of(args, kwargs)
        if self._runtime.gpu is None:
            grow_in_place(kwargs.get("past_key_values"))
        if self._runtime.recorder is not None:
            mask_BS = kwargs.get("attention_mask")
            # masks of more dimensions say which token may see which, not which token is padding
            is_padding = isinstance(mask_BS, torch.Tensor) and mask_BS.dim() == 2
            token_BS = kwargs.get("input_ids", args[0] if args else None)
            self._runtime.recorder.begin_call(
                *(batch, num_tokens, _cached_tokens(kwargs)),
                mask_BS.bool().cpu().numpy() if is_padding else None,
                token_BS.cpu().numpy().astype(np.int32) if isinstance(token_BS, torch.Tensor) else None,
            )
        begun = self._begun.setdefault(threading.get_ident(), [])
        del begun[:-MOST_NESTED]
        begun.append((time.perf_counter(), num_tokens))

    @torch.compiler.disable
    def end(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        runtime = self._runtime
        if runtime.recorder is not None:
            runtime.recorder.end_call()
        if runtime.prefetcher is not None:
            tried = total_ahead(slots.ahead_counters for slots in runtime.layers)
            runtime.prefetcher.judge(tried.issued, tried.useful, tried.late)
        begun = self._begun[threading.get_ident()]
        started_s, num_tokens = begun.pop()
        if not begun:
            del self._begun[threading.get_ident()]
        runtime.counters.end_call(time.perf_counter() - started_s, num_tokens)


def _shape_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """B and S of a call of `forward`, whether it is given ids or embeddings; 1 and 1 where neither is a tensor."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if tokens is None:
        tokens = kwargs.get("inputs_embeds")
    return (tokens.shape[0], tokens.shape[1]) if isinstance(tokens, torch.Tensor) else (1, 1)


def _cached_tokens(kwargs: dict[str, Any]) -> int:
    """Tokens of each sequence whose keys and values are in the cache that a call is given."""
    cache = kwargs.get("past_key_values")
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
