"""Tokens of a call by sequence and position, and a router's state of a sequence in the key/value cache.

A state stands beside the keys of its position, so beam search, cropping and copies treat it as they treat keys.

Shapes: T tokens, B sequences, S positions of this call, R routable experts or other columns.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from ...contract.context import RoutingContext


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where each token of a call stands in a grid of sequences and positions; short rows are filled at their end.

    Args:
        place_T: int64 places in the flattened grid.
        is_valid_BS: False for padding and for places that no token has.
    """

    place_T: Tensor
    is_valid_BS: Tensor

    @classmethod
    def of(cls, context: RoutingContext, num_tokens: int, device: torch.device) -> Self:
        """Of the tokens of a call, in whatever order they come.

        Raises:
            ValueError: if two tokens of a sequence have the same position.
        """
        valid_T = context.is_valid_T
        if valid_T is None:
            valid_T = torch.ones(num_tokens, dtype=torch.bool, device=device)
        if num_tokens == 1:
            return cls(torch.zeros(1, dtype=torch.int64, device=device), valid_T.view(1, 1))
        place_T, shape_BS = _places(context, valid_T)
        is_valid = torch.zeros(shape_BS, dtype=torch.bool, device=device)
        is_valid.view(-1)[place_T] = valid_T
        return cls(place_T, is_valid)

    def grid(self, x_TR: Tensor) -> Tensor:
        """[B, S, R], with 0 where no token stands."""
        flat = x_TR.new_zeros(self.is_valid_BS.numel(), x_TR.shape[1])
        return flat.index_put((self.place_T,), x_TR).view(*self.is_valid_BS.shape, -1)

    def flat(self, x_BSR: Tensor) -> Tensor:
        """[T, R]: the tokens of a grid in the order of the call."""
        return x_BSR.flatten(0, 1)[self.place_T]


class SequenceState:
    """One router's state of each sequence, kept in a layer of the call's cache behind those of keys and values.

    Args:
        cache: of the call, or None, which keeps nothing.
        layer: which layer of the cache.

    Raises:
        ValueError: if the cache is of a kind that cannot grow.
    """

    def __init__(self, cache: object, layer: int) -> None:
        if cache is not None and type(cache) is not DynamicCache:
            raise ValueError(
                "this router keeps its state of a sequence in a DynamicCache, the default of generate; "
                f"got a {type(cache).__name__}"
            )
        self._cache, self._layer = cache, layer

    def latest(self) -> Tensor | None:
        """[B, R] after the last position of earlier calls; None before the first."""
        earlier = self.earlier(1)
        return None if earlier is None else earlier[:, -1]

    def earlier(self, count: int) -> Tensor | None:
        """[B, 0..count, R] after the last positions of earlier calls; None before the first."""
        if self._cache is None or len(self._cache.layers) <= self._layer:
            return None
        layer = self._cache.layers[self._layer]
        return layer.keys[:, 0, -count:] if layer.get_seq_length() else None

    def append(self, state_BSR: Tensor) -> None:
        """Keep the state after each position of this call."""
        if self._cache is None:
            return
        while len(self._cache.layers) <= self._layer:
            self._cache.layers.append(DynamicLayer())
        self._cache.update(state_BSR[:, None], state_BSR[:, None, :, :1], self._layer)


def _places(context: RoutingContext, valid_T: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Places of tokens in the grid, by sequence and then by position, and the grid's shape."""
    place_T = torch.arange(len(valid_T), device=valid_T.device)
    position_T = place_T if context.position_T is None else context.position_T
    if context.sequence_T is None:
        row_T = torch.zeros_like(place_T)
    else:
        _, row_T = context.sequence_T.unique(return_inverse=True)
    order_T = position_T.argsort(stable=True)
    order_T = order_T[row_T[order_T].argsort(stable=True)]
    count_B = row_T.bincount()
    rows, start_B = row_T[order_T], count_B.cumsum(0) - count_B
    width = int(count_B.max())
    sorted_T = position_T[order_T][valid_T[order_T]]
    is_same_row = rows[valid_T[order_T]].diff() == 0
    if ((sorted_T.diff() == 0) & is_same_row).any():
        raise ValueError("expected one token per position of a sequence; got two tokens at one position")
    return place_T.scatter(0, order_T, rows * width + place_T - start_B[rows]), (len(count_B), width)
