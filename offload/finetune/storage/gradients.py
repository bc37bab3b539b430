"""The gradients of experts between the backward pass and the step, in memory up to a limit, beyond it on the disk.

The step has to wait: it is scaled by the norm of all gradients together, and the last one is not known before the
first layer's backward pass.
"""

import tempfile
from pathlib import Path

import torch

from ...checkpoint.tensors import read_into
from .records import Key, write_all

OPENED = "kept gradients"


class KeptGradients:
    """One flat float32 gradient for each expert that a step touches.

    Args:
        limit_bytes: in memory at most.
        folder: where the rest goes, into a file without a name.
    """

    def __init__(self, limit_bytes: int, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._limit_bytes, self._folder = limit_bytes, folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  lives as long as the run
        self._here: dict[Key, torch.Tensor] = {}
        self._there: dict[Key, tuple[int, int]] = {}
        self._held_bytes = self._end = 0
        self._squares: dict[Key, float] = {}

    def close(self) -> None:
        """Give memory and disk back."""
        self._file.close()
        self._here.clear()

    def clear(self) -> None:
        """Forget every gradient."""
        self._here.clear()
        self._there.clear()
        self._squares.clear()
        self._held_bytes = self._end = 0

    def keep(self, key: Key, grad: torch.Tensor) -> None:
        """Keep an expert's gradient.

        Raises:
            OSError: if the disk is full.
        """
        self._squares[key] = grad.double().square_().sum().item()
        if self._held_bytes + grad.nbytes <= self._limit_bytes:
            self._here[key] = grad
            self._held_bytes += grad.nbytes
            return
        data = memoryview(grad.contiguous().numpy()).cast("B")
        write_all(self._file.fileno(), data, self._end)
        self._there[key] = (self._end, len(data))
        self._end += len(data)

    @property
    def keys(self) -> list[Key]:
        """Whose gradients are kept, in the order of layers and experts."""
        return sorted(self._squares)

    def square(self) -> float:
        """The sum of all squares, in float64 and in the order of `keys`."""
        return sum(self._squares[key] for key in self.keys)

    def take(self, key: Key) -> torch.Tensor:
        """An expert's gradient, which is not kept any more."""
        del self._squares[key]
        if key in self._here:
            grad = self._here.pop(key)
            self._held_bytes -= grad.nbytes
            return grad
        offset, nbytes = self._there.pop(key)
        grad = torch.empty(nbytes // 4, dtype=torch.float32)
        read_into(self._folder / OPENED, self._file.fileno(), offset, memoryview(grad.numpy()).cast("B"))
        if not self._there:
            self._end = 0
        return grad
