"""What autograd keeps for the backward pass, in memory up to a limit, beyond it on the disk; bits stay what they are.

Experts keep their inputs only and are computed again. Everything else that a layer keeps passes through here: as long
as there is room it stays, then it is written, and read when its backward pass comes. Layers near the end, which come
back first, are those that are written.

Source: Zhao et al. 2024 (MEMO), arXiv:2407.12117, which chooses among keeping, computing again and spilling; here
tensors are kept or spilled as a whole.
"""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from xxhash import xxh3_128_digest

from ...checkpoint.tensors import read_into
from .records import write_all
from .visits import Traffic

LEAST_BYTES = 1 << 14
"""Smaller tensors stay: a read of the disk takes as long for them as for one of this size. Not tuned."""
OPENED = "spilled activations"


@dataclass(frozen=True)
class Spilled:
    """A tensor on the disk.

    Args:
        offset: of its first byte.
        shape, stride: of its elements; they fill their bytes without gaps.
        dtype: of an element.
    """

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class SpilledActivations:
    """What the passes of one step keep.

    Args:
        limit_bytes: in memory at most, small tensors and views with gaps not counted.
        folder: where the rest goes, into a file without a name.
        traffic: counts what is written and read.
        resident: tensors that are in memory anyway, such as weights.
    """

    def __init__(self, limit_bytes: int, folder: Path, traffic: Traffic, resident: Iterable[torch.Tensor]) -> None:
        self._limit_bytes, self._folder, self._traffic = limit_bytes, folder, traffic
        self._resident = {tensor.untyped_storage().data_ptr() for tensor in resident}
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  lives as long as the run
        self._written: dict[bytes, int] = {}
        self._held_bytes = self._end = 0

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        """While this is open in a thread, what autograd saves there goes through here."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def begin(self) -> None:
        """A new step: nothing is kept any more."""
        self._written.clear()
        self._held_bytes = self._end = 0

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | Spilled:
        is_small = tensor.nbytes < LEAST_BYTES
        if is_small or tensor.untyped_storage().data_ptr() in self._resident or not _is_dense(tensor):
            return tensor
        if self._held_bytes + tensor.nbytes <= self._limit_bytes:
            self._held_bytes += tensor.nbytes
            return tensor
        flat = tensor.detach().as_strided((tensor.numel(),), (1,))
        offset = self._write(memoryview(flat.view(torch.uint8).numpy()))
        return Spilled(offset, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def _write(self, data: memoryview) -> int:
        """Where these bytes are: several operations save the same tensor, which is written once."""
        digest = xxh3_128_digest(data)
        if digest not in self._written:
            write_all(self._file.fileno(), data, self._end)
            self._written[digest] = self._end
            self._end += len(data)
            self._traffic.bytes_written += len(data)
        return self._written[digest]

    def _unpack(self, kept: torch.Tensor | Spilled) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        count = torch.Size(kept.shape).numel()
        flat = torch.empty(count, dtype=kept.dtype)
        data = memoryview(flat.view(torch.uint8).numpy())
        read_into(self._folder / OPENED, self._file.fileno(), kept.offset, data)
        self._traffic.bytes_read += len(data)
        return flat.as_strided(kept.shape, kept.stride)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their bytes without gaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
