"""Keys and values of a mixture of recursions: of the tokens alive in each recursion, or the first one's for all.

Shapes: B batch, U tokens of a pass, Y keys in a cache, S positions.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True, eq=False)
class Subset:
    """Some tokens of each row, in order, padded at the end.

    Args:
        index_BU: int64 place in the row; 0 in padding.
        is_valid_BU: False in padding.
    """

    index_BU: Tensor
    is_valid_BU: Tensor

    @classmethod
    def of(cls, is_alive_BS: Tensor) -> Self:
        longest = int(is_alive_BS.sum(dim=1).max())
        index_BU = (~is_alive_BS).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
        is_valid_BU = is_alive_BS.gather(1, index_BU)
        return cls(index_BU.masked_fill(~is_valid_BU, 0), is_valid_BU)

    def gather(self, x_BSD: Tensor) -> Tensor:
        """[B, U, ...] of [B, S, ...] (or of [1, S, ...], the same for all rows)."""
        x_BSD = x_BSD.expand(len(self.index_BU), *x_BSD.shape[1:])
        return torch.take_along_dim(x_BSD, self.index_BU.view(*self.index_BU.shape, *[1] * (x_BSD.ndim - 2)), dim=1)

    def token_T(self, num_positions: int) -> Tensor:
        """int64 [B * U]: places among the tokens of the whole batch."""
        row_B1 = torch.arange(len(self.index_BU), device=self.index_BU.device)[:, None]
        return (row_B1 * num_positions + self.index_BU).flatten()

    def scatter(self, x_BSD: Tensor, new_BUD: Tensor) -> Tensor:
        """A copy of `x_BSD` with these tokens replaced."""
        is_valid_T = self.is_valid_BU.flatten()
        token_T = self.token_T(x_BSD.shape[1])[is_valid_T]
        new_TD = new_BUD.flatten(0, 1)[is_valid_T].to(x_BSD.dtype)
        return x_BSD.flatten(0, 1).index_put((token_T,), new_TD).view_as(x_BSD)


def visible_mask(key_column_BY: Tensor, query_column_BU: Tensor, is_valid_BU: Tensor) -> Tensor:
    """bool [B, 1, U, Y]: earlier keys and the token's own; padding queries see everything, lest their softmax be empty.

    Columns count from the start of the row; -1 marks a key that is padding.
    """
    is_before = key_column_BY[:, None, :] <= query_column_BU[:, :, None]
    is_key = (key_column_BY >= 0)[:, None, :]
    return ((is_before & is_key) | ~is_valid_BU[:, :, None])[:, None]


class RecursionLayer(DynamicLayer):
    """Keys and values of the tokens that reached one recursion of one layer, with the column of each."""

    def __init__(self) -> None:
        super().__init__()
        self.column_BY: Tensor | None = None
        self.num_columns = 0

    def append(self, key: Tensor, value: Tensor, column_BU: Tensor) -> tuple[Tensor, Tensor]:
        """Add a call's tokens; -1 is the column of padding."""
        parts = [column_BU] if self.column_BY is None else [self.column_BY, column_BU]
        self.column_BY = torch.cat(parts, dim=1)
        return self.update(key, value)

    def crop(self, tokens_to_remove: int) -> None:
        self.num_columns -= abs(tokens_to_remove)
        if self.column_BY is None:
            return
        self.column_BY = self.column_BY.masked_fill(self.column_BY >= self.num_columns, -1)
        is_kept_Y = (self.column_BY >= 0).any(dim=0)
        self.column_BY = self.column_BY[:, is_kept_Y]
        self.keys, self.values = self.keys[:, :, is_kept_Y], self.values[:, :, is_kept_Y]

    def reset(self) -> None:
        super().reset()
        self.column_BY, self.num_columns = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        if self.column_BY is not None:
            self.column_BY = self.column_BY[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.column_BY is not None:
            self.column_BY = self.column_BY.repeat_interleave(repeats, dim=0)


class RecursionKeys:
    """What attention sees as its cache in one later recursion: the block's layers write to layers of their own.

    Args:
        layers: by decoder layer.
        column_BU: of the pass's tokens, -1 for padding.
    """

    def __init__(self, layers: dict[int, RecursionLayer], column_BU: Tensor) -> None:
        self._layers, self._column_BU = layers, column_BU

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        return self._layers[layer_idx].append(key, value, self._column_BU)


class KeptKeys:
    """What attention sees as its cache in the first recursion when later ones read its keys: remembers what it returns.

    Args:
        cache: the cache of the decoder, or None.
    """

    def __init__(self, cache: Cache | None) -> None:
        self._cache = cache
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        self.kept[layer_idx] = (key, value) if self._cache is None else self._cache.update(key, value, layer_idx)
        return self.kept[layer_idx]


def recursion_layers(cache: Cache, recursion: int, block: range, num_layers: int) -> dict[int, RecursionLayer]:
    """The cache layers of a later recursion, which stand behind those of the decoder; made when they are missing."""
    first = num_layers + (recursion - 1) * len(block)
    while len(cache.layers) < first + len(block):
        cache.layers.append(RecursionLayer())
    return {layer: cache.layers[first + place] for place, layer in enumerate(block)}
