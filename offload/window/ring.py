"""Memory that is taken and given back in the same order: a ring of blocks."""

from collections import deque

import torch

from ..formats.form import BLOCK_BYTES
from ..store.store import Slots


class Ring:
    """Places in a ring, of any lengths, in blocks.

    Each place is in one piece, so a place that does not fit before the end begins at 0.

    Args:
        num_blocks: its size.
    """

    def __init__(self, num_blocks: int) -> None:
        self._size = num_blocks
        self._taken: deque[tuple[int, int]] = deque()

    def take(self, num_blocks: int) -> int | None:
        """Where so many free blocks begin, which are taken now; None while there are none in one piece."""
        start = self._start(num_blocks)
        if start is not None:
            self._taken.append((start, start + num_blocks))
        return start

    def give_back(self) -> None:
        """Free the place that was taken first."""
        self._taken.popleft()

    def clear(self) -> None:
        """Free all places."""
        self._taken.clear()

    def _start(self, count: int) -> int | None:
        if not self._taken:
            return 0 if count <= self._size else None
        first, end = self._taken[0][0], self._taken[-1][1]
        if end <= first:  # the newest place lies before the oldest one
            return end if count <= first - end else None
        if count <= self._size - end:
            return end
        return 0 if count <= first else None


class RingMemory(Slots):
    """The memory of a ring; a slot's number is the block at which it begins, and it reaches to the end.

    Args:
        num_blocks: its size.
    """

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks, BLOCK_BYTES)

    def slot(self, index: int) -> torch.Tensor:
        return self.tensor[index * BLOCK_BYTES :]

    def raw(self, index: int) -> memoryview:
        return self.bytes[index * BLOCK_BYTES :]
