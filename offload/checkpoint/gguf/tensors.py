"""Everything of a GGUF model but its experts, as tensors that are read and expanded when they are indexed."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch

from ..tensors import PLAIN_DTYPES, TensorEntry
from .architectures import Change

Expand = Callable[[TensorEntry, torch.dtype], torch.Tensor]
"""(tensor of a file, dtype) -> its values, each rounded once, in memory of their own."""


class GgufTensor:
    """One parameter; stands in for a safetensors slice while transformers loads a model.

    Args:
        entries: the tensors it consists of; of two, the rows of a bias of gate and up alternate.
        shape: what the model wants; axes of length 1 may be missing in the file.
        dtype: of the model. What a file holds as plain numbers comes as it is, because some parameters stay float32.
        change: makes the model's values of the file's.
        expand: makes numbers of stored bytes.
    """

    def __init__(
        self,
        entries: Sequence[TensorEntry],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        change: Change,
        expand: Expand,
    ) -> None:
        self._entries, self._change, self._expand = tuple(entries), change, expand
        is_plain = all(entry.dtype in PLAIN_DTYPES for entry in entries)
        self.shape, self.dtype = shape, entries[0].torch_dtype() if is_plain else dtype

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __getitem__(self, key: Any) -> torch.Tensor:
        tensor = self._values()
        return tensor if key is Ellipsis else tensor[key]

    def _values(self) -> torch.Tensor:
        parts = [_changed(entry, self.dtype, self._change, self._expand) for entry in self._entries]
        whole = parts[0] if len(parts) == 1 else torch.stack(parts, dim=-1).flatten(-2)
        if whole.numel() != prod(self.shape) or not _is_same_but_ones(tuple(whole.shape), self.shape):
            raise ValueError(
                f"{self._entries[0].file}: tensor {self._entries[0].name} has the shape {list(whole.shape)}, "
                f"the model wants {list(self.shape)}"
            )
        return whole.reshape(self.shape)


def _is_same_but_ones(found: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return [length for length in found if length > 1] == [length for length in wanted if length > 1]


def _changed(entry: TensorEntry, dtype: torch.dtype, change: Change, expand: Expand) -> torch.Tensor:
    """A tensor's values as the model has them.

    Matrices are large, and what happens to most is nothing, or a new order of rows; so those are never held as float32.
    """
    order = row_order(entry, change)
    if order is None:
        values = change(expand(entry, torch.float32).numpy(), entry.name)
        return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
    values_FD = expand(entry, dtype)
    return values_FD if len(order) == 0 else values_FD[order]


def row_order(entry: TensorEntry, change: Change) -> torch.Tensor | None:
    """The new order of rows; empty if it is the old one, None if more than the order changes."""
    if len(entry.shape) != 2:
        return None
    rows = entry.shape[0]
    numbers_F1 = np.arange(rows, dtype=np.float64).reshape(rows, 1)
    try:
        moved_F1 = change(numbers_F1, entry.name)
    except ValueError:  # a change that also counts columns
        return None
    if moved_F1.shape != (rows, 1) or not np.array_equal(np.sort(moved_F1, axis=0), numbers_F1):
        return None
    if np.array_equal(moved_F1, numbers_F1):
        return torch.empty(0, dtype=torch.int64)
    return torch.from_numpy(moved_F1[:, 0].astype(np.int64))
