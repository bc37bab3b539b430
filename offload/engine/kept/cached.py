"""Tokens and their keys and values, from which later sequences with the same beginning can start.

transformers' growing caches replace their tensors and never write into them, so that a fork shares memory with what it
was forked from until it grows. Layers that forget (sliding windows) or fold tokens into a state (linear attention)
cannot go back to any token; snapshots say to which they can.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

MOST_SNAPSHOTS = 4
"""Snapshots of one sequence: ends of prompt and answer, and the last pieces of a prompt. Each costs a window of keys
and values in the layers that need it; not tuned."""


class CachedTokens:
    """Token ids and the cache that a model filled with them.

    Args:
        cache: transformers' cache; grows with `token_ids`.
        token_ids: the tokens whose keys and values are in it.
        num_canonical: leading tokens that were computed in the same pieces as in any prompt that begins with them.
    """

    def __init__(self, cache: Any, token_ids: Sequence[int] = (), num_canonical: int = 0) -> None:
        self.cache = cache
        self.token_ids = list(token_ids)
        self.num_canonical = num_canonical
        self.end_logits_V: torch.Tensor | None = None
        """Logits after the last prompt token, while the sequence stands there; a second answer starts with them."""
        self._snapshots: dict[int, list[Any]] = {}

    @classmethod
    def empty(cls, config: Any) -> "CachedTokens":
        """No tokens, for a model with this config."""
        return cls(DynamicCache(config=config))

    def __len__(self) -> int:
        return len(self.token_ids)

    def common(self, token_ids: Sequence[int]) -> int:
        """Length of the longest common prefix with these tokens."""
        most = min(len(self.token_ids), len(token_ids))
        # slices compare in C; a loop over 20,000 ids takes milliseconds per kept prefix
        if self.token_ids[:most] == list(token_ids[:most]):
            return most
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.token_ids[:middle] == list(token_ids[:middle]) else (low, middle - 1)
        return low

    def reachable(self, length: int) -> int:
        """The most leading tokens, up to `length`, from which a fork can go on."""
        if length >= len(self) or all(_can_crop(layer) for layer in self.cache.layers):
            return min(length, len(self))
        return max((place for place in self._snapshots if place <= length), default=0)

    def fork(self, length: int) -> "CachedTokens":
        """The first `length` tokens, which must be `reachable`; both can grow independently."""
        taken = CachedTokens(copy.copy(self.cache), self.token_ids[:length], min(self.num_canonical, length))
        parts = self._snapshots.get(length, self.cache.layers if length == len(self) else [])
        taken.cache.layers = [
            _crop(layer, length) if _can_crop(layer) else _copy(parts[number])
            for number, layer in enumerate(self.cache.layers)
        ]
        taken._snapshots = {place: kept for place, kept in self._snapshots.items() if place <= length}
        if length == len(self):
            taken.end_logits_V = self.end_logits_V
        return taken

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and states, those of snapshots included."""
        layers = [*self.cache.layers, *(layer for kept in self._snapshots.values() for layer in kept if layer)]
        values = [value for layer in layers for value in vars(layer).values()]
        values += [part for value in values if isinstance(value, list | tuple) for part in value]
        tensors = [value for value in [*values, self.end_logits_V] if isinstance(value, torch.Tensor)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def begin_trial(self) -> None:
        """From now on, the last tokens can be taken back by `end_trial`; only for plain caches."""
        for layer in self.cache.layers:
            if _kind(layer) is DynamicSlidingWindowLayer:
                layer.activate_past_recording()

    def end_trial(self, rejected: int) -> None:
        """Take back the last `rejected` tokens, 0 or more, which came after `begin_trial`."""
        self.cache.crop(-rejected)
        del self.token_ids[len(self.token_ids) - rejected :]
        for layer in self.cache.layers:
            if _kind(layer) is DynamicSlidingWindowLayer:
                layer.record_past = False

    def take_snapshot(self) -> None:
        """Remember this place, if some layer could not go back to it later."""
        if len(self) and not all(_can_always_crop(layer) for layer in self.cache.layers):
            self._snapshots[len(self)] = [
                None if _can_always_crop(layer) else _copy(layer) for layer in self.cache.layers
            ]
            while len(self._snapshots) > MOST_SNAPSHOTS:
                del self._snapshots[min(self._snapshots)]


def is_plain(cache: Any) -> bool:
    """Whether all layers keep keys and values of single tokens, of all or of a window of them."""
    return all(_kind(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def _kind(layer: Any) -> type:
    """The class of transformers that a layer has or extends."""
    return next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("transformers."))


def _can_always_crop(layer: Any) -> bool:
    return _kind(layer) is DynamicLayer


def _can_crop(layer: Any) -> bool:
    """Whether the layer can go back to any of its tokens: it has not forgotten one."""
    if _kind(layer) is DynamicSlidingWindowLayer:
        return bool(layer.cumulative_length < layer.sliding_window)
    return _can_always_crop(layer)


def _crop(layer: Any, length: int) -> Any:
    taken = copy.copy(layer)
    if taken.is_initialized:
        taken.keys, taken.values = layer.keys[..., :length, :], layer.values[..., :length, :]
    if _kind(taken) is DynamicSlidingWindowLayer:
        taken.cumulative_length = length
    return taken


def _copy(layer: Any) -> Any:
    if _kind(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        return copy.deepcopy(layer)  # states of linear attention are written in place
    taken = copy.copy(layer)
    if taken.is_initialized and taken.keys.untyped_storage().nbytes() > 2 * taken.keys.nbytes:
        # the window is a view of a whole piece of the prompt, which would live as long as the snapshot
        taken.keys, taken.values = layer.keys.clone(), layer.values.clone()
    return taken
