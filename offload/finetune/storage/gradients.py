"""The gradients of experts between the backward pass and the step, in memory up to a limit, beyond it on the disk.

The step has to wait: it is scaled by the norm of all gradients together, and the last one is not known before the
first layer's backward pass. What is kept is summed over the passes by a thread of its own meanwhile.
"""

import ctypes
import functools
import tempfile
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.tensors import read_into
from ...formats.form import BLOCK_BYTES
from ...native.library import NUMBER, POINTER, c_function
from ...store.store import Slots
from .records import Key, write_all

OPENED = "kept gradients"
MOST_WAITING = 2
"""Experts whose gradients wait to be summed; each pass has one of its own. Not tuned."""


class KeptGradients:
    """One flat float32 gradient for each expert that a step touches.

    Args:
        limit_bytes: in memory at most, which is taken at once: fresh memory for each would cost page faults.
        folder: where the rest goes, into a file without a name.
        num_elements: of one gradient, at most.
        num_experts: of all layers.
    """

    def __init__(self, limit_bytes: int, folder: Path, num_elements: int, num_experts: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        room_bytes = -(-4 * num_elements // BLOCK_BYTES) * BLOCK_BYTES
        count = min(limit_bytes // room_bytes, num_experts)
        rooms = Slots(count, room_bytes)
        self._rooms = [rooms.slot(number).view(torch.float32) for number in range(count)]
        self._free = list(self._rooms)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  lives as long as the run
        self._here: dict[Key, torch.Tensor] = {}
        self._there: dict[Key, tuple[int, int]] = {}
        self._end = 0
        self._squares: dict[Key, float] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="expertier-gradient")
        self._waiting: deque[Future[None]] = deque()

    def close(self) -> None:
        """Give memory and disk back."""
        self._thread.shutdown(cancel_futures=True)
        self._file.close()
        self._here.clear()
        self._rooms, self._free = [], []

    def clear(self) -> None:
        """Forget every gradient."""
        self._wait()
        self._here.clear()
        self._there.clear()
        self._squares.clear()
        self._free, self._end = list(self._rooms), 0

    def keep(self, key: Key, grads: Sequence[Sequence[torch.Tensor]]) -> None:
        """Keep an expert's gradient: the sum over all passes, in their order.

        Args:
            key: whose.
            grads: of each matrix, one for each pass; left alone from now on.

        Raises:
            OSError: if the disk is full; perhaps from a later call only.
        """
        self._wait(MOST_WAITING)
        self._waiting.append(self._thread.submit(self._keep, key, grads))

    def _wait(self, most: int = 0) -> None:
        """Let all but the last `most` be summed."""
        while len(self._waiting) > most:
            self._waiting.popleft().result()

    def _keep(self, key: Key, grads: Sequence[Sequence[torch.Tensor]]) -> None:
        sizes = [of_matrix[0].numel() for of_matrix in grads]
        is_held = bool(self._free)
        grad = (self._free.pop() if is_held else torch.empty(sum(sizes)))[: sum(sizes)]
        for part, of_matrix in zip(grad.split(sizes), grads, strict=True):
            sum_into(part, of_matrix)
        self._squares[key] = grad.double().square_().sum().item()
        if is_held:
            self._here[key] = grad
            return
        data = memoryview(grad.contiguous().numpy()).cast("B")
        write_all(self._file.fileno(), data, self._end)
        self._there[key] = (self._end, len(data))
        self._end += len(data)

    @property
    def keys(self) -> list[Key]:
        """Whose gradients are kept, in the order of layers and experts."""
        self._wait()
        return sorted(self._squares)

    def square(self) -> float:
        """The sum of all squares, in float64 and in the order of `keys`."""
        return sum(self._squares[key] for key in self.keys)

    def take(self, key: Key) -> torch.Tensor:
        """An expert's gradient, which is not kept any more; it stays what it is until others are kept.

        `clear` comes before that.
        """
        del self._squares[key]
        if key in self._here:
            return self._here.pop(key)
        offset, nbytes = self._there.pop(key)
        grad = torch.empty(nbytes // 4, dtype=torch.float32)
        read_into(self._folder / OPENED, self._file.fileno(), offset, memoryview(grad.numpy()).cast("B"))
        if not self._there:
            self._end = 0
        return grad


def sum_into(total: torch.Tensor, grads: Sequence[torch.Tensor]) -> None:
    """Add one gradient after the other, at least one, in float32.

    Args:
        total: flat, float32; written.
        grads: as many numbers each; of bfloat16, our C adds them, bit-identical to torch.
    """
    add = _add()
    if add is not None and all(grad.dtype == torch.bfloat16 and grad.is_contiguous() for grad in grads):
        addresses = (ctypes.c_void_p * len(grads))(*(grad.data_ptr() for grad in grads))
        add(addresses, len(grads), total.numel(), total.data_ptr())
        return
    total.copy_(grads[0].reshape(-1))
    for grad in grads[1:]:
        total += grad.reshape(-1)


@functools.cache
def _add() -> Any:
    """`expertier_sum_gradients`; None without a C compiler."""
    return c_function("expertier_sum_gradients", POINTER, NUMBER, NUMBER, POINTER)
