"""A KV cache that grows in place: a new token is written behind the others, which are not copied for it.

The numbers are those of transformers' `DynamicCache`, and so is everything but `update`.

Shapes: B sequences, H heads of keys and values, S positions, W head width.
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..memory.huge_pages import huge_mapping
from .matvec import is_in_memory

LEAST_AHEAD, SHARE_AHEAD = 64, 16
"""Positions that a new room has to spare: 64, or a sixteenth of those it holds. A room that is full is copied to a
larger one: with a sixteenth, each token copies 16 others on average, where `torch.cat` copies all. More would save less
and less time for more and more memory."""
ROUNDED_POSITIONS = 32
"""A room has a multiple of these, so that each head begins at a multiple of 64 bytes, as in an array of its own."""
ROOMS = "_expertier_rooms"  # where a layer of transformers keeps what is ours
HUGE_BYTES = 2 << 20  # one huge page of x86 and of most ARM kernels; smaller rooms would waste most of theirs


def grow_in_place(cache: Any) -> None:
    """Let the layers of a `DynamicCache` append in place from now on; other caches stay as they are."""
    for layer in getattr(cache, "layers", ()):
        if (successor := SUCCESSORS.get(type(layer))) is not None:
            layer.__class__ = successor


def room_positions(positions: int) -> int:
    """Positions of a new room for a sequence that has so many."""
    wanted = positions + max(LEAST_AHEAD, positions // SHARE_AHEAD)
    return -(-wanted // ROUNDED_POSITIONS) * ROUNDED_POSITIONS


class _Room:
    """Memory for more keys (or values) of a layer than there are.

    What was handed out is never overwritten, so that whoever holds an earlier view keeps its numbers: positions are
    only written behind `end`, and only for the layer whose array is the very one that was made last. After `crop`, a
    reordering, or an exception in the middle, that is another one, and the next tokens are appended to a copy.
    """

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None
        self._end = 0
        self._latest: torch.Tensor | None = None
        self._known: tuple[int, int] | None = None
        """Heads and width of bfloat16 numbers of one sequence, as which `can_extend` has looked at what is held."""

    def append(self, held: torch.Tensor, new_BHSW: torch.Tensor) -> torch.Tensor:
        """What is held and what is new, one behind the other."""
        if held is not self._latest:
            # a layer that is changed after each token (beam search) gains nothing from a room
            self._memory, self._latest, self._known = None, None, None
            return torch.cat([held, new_BHSW], dim=-2)
        self._known = None
        extended = self.extend(held, new_BHSW.shape[-2])
        extended.narrow(-2, held.shape[-2], new_BHSW.shape[-2]).copy_(new_BHSW)
        return extended

    def extend(self, held: torch.Tensor, length: int) -> torch.Tensor:
        """What is held, with more positions behind it, which the caller writes."""
        before = held.shape[-2]
        is_own = held is self._latest
        if not is_own or self._memory is None or self._end + length > self._memory.shape[-2]:
            self._memory, self._end = self._moved(held, length), before
        start, self._latest = self._end, None
        self._end = start + length
        return self._memory.narrow(-2, start - before, before + length)

    def knows(self, held: torch.Tensor, like_1J1W: tuple[int, int]) -> bool:
        """Whether these are numbers that `know` was told of, extended by others since."""
        return held is self._latest and self._known == like_1J1W

    def know(self, like_1J1W: tuple[int, int]) -> None:
        """What is held is bfloat16, of one sequence, and of so many heads of this width."""
        self._known = like_1J1W

    def keep(self, held: torch.Tensor) -> torch.Tensor:
        """What the layer holds from now on, a view that ends with what was appended last."""
        self._latest = held
        return held

    def _moved(self, held: torch.Tensor, length: int) -> torch.Tensor:
        positions = room_positions(held.shape[-2] + length)
        memory = _empty((*held.shape[:-2], positions, held.shape[-1]), held.dtype)
        memory.narrow(-2, 0, held.shape[-2]).copy_(held)
        return memory


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # an inference tensor could not be written to outside inference mode
    with torch.inference_mode(False):
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        if nbytes < HUGE_BYTES:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(huge_mapping(nbytes), dtype=torch.uint8).view(dtype).view(shape)


def _rooms(layer: DynamicLayer) -> tuple[_Room, _Room]:
    """The rooms of a layer's keys and values."""
    rooms: tuple[_Room, _Room] = layer.__dict__.setdefault(ROOMS, (_Room(), _Room()))
    return rooms


def _can_grow(layer: DynamicLayer, *new: torch.Tensor) -> bool:
    """Whether arrays may be written in place: numbers in memory, and nobody wants gradients."""
    if torch.compiler.is_compiling() or not all(map(is_in_memory, new)):
        return False
    if not layer.is_initialized:
        layer.lazy_initialization(*new)
    return not (torch.is_grad_enabled() and any(states.requires_grad for states in (*new, layer.keys, layer.values)))


def can_extend(layer: Any, like_1J1W: tuple[int, int]) -> bool:
    """Whether a layer of a cache is one of ours and holds bfloat16 keys and values of one sequence in memory.

    Args:
        like_1J1W: heads J and head width W of keys and of values.
    """
    if type(layer) not in (GrowingLayer, GrowingWindow) or not layer.is_initialized:
        return False
    if getattr(layer, "record_past", False):
        return False
    keys, values = _rooms(layer)
    if keys.knows(layer.keys, like_1J1W) and values.knows(layer.values, like_1J1W):
        return True
    for held in (layer.keys, layer.values):
        if held.dim() != 4 or (held.shape[0], held.shape[1], held.shape[3]) != (1, *like_1J1W):
            return False
        if held.dtype != torch.bfloat16 or held.requires_grad or not is_in_memory(held):
            return False
    keys.know(like_1J1W)
    values.know(like_1J1W)
    return True


def _state(layer: DynamicLayer) -> dict[str, Any]:
    """What is copied of a layer: copies, also those in other processes, get rooms of their own."""
    return {name: value for name, value in vars(layer).items() if name != ROOMS}


# one base class each: an object can only change to a class of the same layout
class GrowingLayer(DynamicLayer):
    """The cache of a layer that attends to all positions."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not _can_grow(self, key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        keys, values = _rooms(self)
        self.keys = keys.keep(keys.append(self.keys, key_states))
        self.values = values.keep(values.append(self.values, value_states))
        return self.keys, self.values

    def extend(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with one more position, which the caller writes; `can_extend` says whether it may."""
        keys, values = _rooms(self)
        self.keys = keys.keep(keys.extend(self.keys, 1))
        self.values = values.keep(values.extend(self.values, 1))
        return self.keys, self.values

    def reset(self) -> None:
        vars(self).pop(ROOMS, None)
        super().reset()

    __getstate__ = _state


class GrowingWindow(DynamicSlidingWindowLayer):
    """The cache of a layer that attends to a sliding window; what has left it goes when the room is full."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # a recorded past is cut by `crop` after each call, which leaves nothing to append to
        if self.record_past or not _can_grow(self, key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        self.cumulative_length += key_states.shape[-2]
        keys, values = _rooms(self)
        all_keys, all_values = keys.append(self.keys, key_states), values.append(self.values, value_states)
        self.keys = keys.keep(all_keys[:, :, -self.sliding_window + 1 :, :])
        self.values = values.keep(all_values[:, :, -self.sliding_window + 1 :, :])
        return all_keys, all_values

    def extend(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As in `GrowingLayer`; what is returned is all that the new position sees."""
        self.cumulative_length += 1
        keys, values = _rooms(self)
        all_keys, all_values = keys.extend(self.keys, 1), values.extend(self.values, 1)
        self.keys = keys.keep(all_keys[:, :, -self.sliding_window + 1 :, :])
        self.values = values.keep(all_values[:, :, -self.sliding_window + 1 :, :])
        return all_keys, all_values

    def reset(self) -> None:
        vars(self).pop(ROOMS, None)
        super().reset()

    __getstate__ = _state


SUCCESSORS: dict[type, type] = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: GrowingWindow}
