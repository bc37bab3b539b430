"""Tensors written to a checkpoint folder one after the other, so that no two need to be in memory at once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from routing.ground.files import write_json
from routing.ground.safetensors_head import safetensors_head

from .source import INDEX_NAME, ONLY_NAME

SHARD_BYTES = 5 << 30
"""Of one file at most, unless a single tensor is larger; what transformers writes, too."""
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written.

    Args:
        name: its key in the checkpoint.
        shape: of all pieces together, at least one axis.
        dtype: a key of `DTYPE_NAMES`.
        pieces: makes its parts along the first axis, in order, when its turn comes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def nbytes(self) -> int:
        """Of the whole."""
        return prod(self.shape) * self.dtype.itemsize


def write_tensors(
    folder: Path,
    planned: Sequence[PlannedTensor],
    advance: Callable[[int, int], None] = lambda done, total: None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write safetensors files, with an index if there are several.

    Args:
        folder: an unfinished checkpoint folder.
        planned: written in this order.
        advance: is told after each tensor how many bytes are written, and how many there are.
        shard_bytes: of one file at most, unless a single tensor is larger.

    Returns:
        Bytes of all tensors.

    Raises:
        ValueError: if the pieces of a tensor are not what was planned.
    """
    shards = list(_shards(planned, shard_bytes))
    total, done, weight_map = sum(tensor.nbytes for tensor in planned), 0, {}
    for number, shard in enumerate(shards, 1):
        name = ONLY_NAME if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(safetensors_head((t.name, DTYPE_NAMES[t.dtype], t.shape, t.nbytes) for t in shard))
            for tensor in shard:
                done += _write(tensor, file)
                weight_map[tensor.name] = name
                advance(done, total)
    if len(shards) > 1:
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return total


def _shards(planned: Sequence[PlannedTensor], shard_bytes: int) -> Iterator[list[PlannedTensor]]:
    shard: list[PlannedTensor] = []
    for tensor in planned:
        if shard and sum(held.nbytes for held in shard) + tensor.nbytes > shard_bytes:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def _write(tensor: PlannedTensor, file: IO[bytes]) -> int:
    written = 0
    for piece in tensor.pieces():
        if piece.dtype != tensor.dtype:
            raise ValueError(f"{tensor.name}: planned as {tensor.dtype}, got {piece.dtype}")
        written += file.write(piece.detach().contiguous().flatten().view(torch.uint8).numpy())
    if written != tensor.nbytes:
        raise ValueError(f"{tensor.name}: planned as {tensor.nbytes} bytes, got {written}")
    return written
