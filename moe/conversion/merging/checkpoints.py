"""Checkpoints of one architecture merged tensor by tensor: averages, and sparse task vectors on a base."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...parts.text import carry_text_files
from ..opening import read_config
from ..prune_and_join import different_fields
from ..source import files_of_tensors, read_tensor
from ..staging import staged_folder
from ..tensor_files import PlannedTensor, write_tensors
from .task_vectors import TaskVectors, merged

Combine = Callable[[str, list[Tensor]], Tensor]
"""(name, that tensor of each model) -> the merged tensor."""


def average(folders: Sequence[Path], weights: Sequence[float] | None = None) -> Combine:
    """The weighted mean of all models.

    Source: Wortsman et al. 2022 (model soups), arXiv:2203.05482, section 2.
    """
    shares = shares_of(weights, len(folders))

    def combine(name: str, tensors: list[Tensor]) -> Tensor:
        return sum((share * one.double() for share, one in zip(shares, tensors, strict=True)), torch.zeros(()).double())

    return combine


def sparse_task_vectors(
    folders: Sequence[Path], how: TaskVectors, seed: int, weights: Sequence[float] | None = None
) -> Combine:
    """The first model is the base; the task vectors of the others are made sparse, merged and added to it."""
    shares = shares_of(weights, len(folders) - 1)

    def combine(name: str, tensors: list[Tensor]) -> Tensor:
        streams = [_stream(seed, number, name) for number in range(len(shares))]
        return merged(tensors[0], tensors[1:], shares, how, streams)

    return combine


def merge_checkpoints(
    folders: Sequence[Path], out: Path, combine: Combine, advance: Callable[[int, int], None] = lambda done, total: None
) -> int:
    """Write one checkpoint of several; in memory is one tensor of each.

    Args:
        folders: checkpoints of one architecture and size; config and text files are those of the first.
        out: folder to write; appears whole or not at all.
        combine: of floating tensors; the others must be equal in all models.
        advance: is told how many bytes are written, of how many.

    Returns:
        How many tensors were written.

    Raises:
        ValueError: if the models differ in anything but their weights.
    """
    config = read_config(folders[0])
    for folder in folders[1:]:
        if different := different_fields(config, read_config(folder)):
            raise ValueError(f"{folders[0]} and {folder} differ in {', '.join(different[:5])}; merging needs one model")
    files = [files_of_tensors(folder) for folder in folders]
    for folder, found in zip(folders, files, strict=True):
        if odd := sorted(found.keys() ^ files[0].keys()):
            raise ValueError(f"only one of {folders[0]} and {folder} has the tensor {odd[0]}")
    planned = [_planned(name, files, combine) for name in sorted(files[0])]
    with staged_folder(out) as unfinished:
        config.save_pretrained(unfinished)
        write_tensors(unfinished, planned, advance)
        carry_text_files(folders[0], unfinished)
    return len(planned)


def shares_of(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights divided by their sum; equal ones if none are given.

    Raises:
        ValueError: if there are not as many as models, or they are not positive.
    """
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count or not all(weight > 0 for weight in weights):
        raise ValueError(f"expected {count} positive weights, one per model; got {weights}")
    return [weight / sum(weights) for weight in weights]


def _planned(name: str, files: Sequence[dict[str, Path]], combine: Combine) -> PlannedTensor:
    first = read_tensor(files[0][name], name)
    shape, dtype = tuple(first.shape), first.dtype
    del first

    def pieces() -> Iterator[Tensor]:
        tensors = [read_tensor(found[name], name) for found in files]
        if odd := [tensor for tensor in tensors if tuple(tensor.shape) != shape]:
            raise ValueError(f"{name} has the shapes {list(shape)} and {list(odd[0].shape)}; merging needs one")
        if dtype.is_floating_point:
            yield combine(name, tensors).to(dtype)
            return
        if any(not torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
            raise ValueError(f"{name} is not floating point and differs between the models")
        yield tensors[0]

    return PlannedTensor(name, shape, dtype, pieces)


def _stream(seed: int, model: int, name: str) -> torch.Generator:
    """Random numbers that depend on the seed, the model and the tensor, not on the order of tensors."""
    state = np.random.SeedSequence([seed, model, zlib.crc32(name.encode())]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))
