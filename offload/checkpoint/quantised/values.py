"""Companions whose values say how a matrix lies: they are read when the checkpoint is opened."""

import torch

from ..tensors import TensorEntry, read_tensor

MAX_DIMENSIONS = 3


def shape_in(entry: TensorEntry) -> tuple[int, ...]:
    """A plain tensor's shape, which a companion holds.

    Raises:
        ValueError: if it holds something else.
    """
    if entry.dtype not in ("I64", "I32") or len(entry.shape) != 1 or not 2 <= entry.shape[0] <= MAX_DIMENSIONS:
        raise ValueError(f"{entry.name} {entry.dtype} {list(entry.shape)}: expected a shape of 2 or 3 integers")
    shape = tuple(int(length) for length in read_tensor(entry))
    if min(shape) < 1:
        raise ValueError(f"{entry.name}: holds {list(shape)}, which is no shape")
    return shape


def expect_usual_order(entry: TensorEntry, group: int) -> None:
    """Refuse columns that are not in the order of their groups.

    Raises:
        ValueError: if they are not.
    """
    index = read_tensor(entry)
    usual = torch.arange(index.shape[-1]) // group
    if not (torch.equal(index.long(), usual.expand(index.shape)) or bool((index == -1).all())):
        raise ValueError(
            f"{entry.name}: columns are sorted by activation, so groups are not neighbours; "
            "quantise again without actorder, or use a plain checkpoint"
        )
