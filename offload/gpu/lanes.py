"""What the GPU tier asks of a device: work in order on one stream, copies in order on another, and who waits for whom.

`CudaLane` (cuda.py) is the only one that ships. The tests have another, which runs both streams late and in any
order that the waits allow, so that a missing wait changes a result.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

Result = TypeVar("Result")
Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""(target, source) tensors of equal shapes and dtypes."""


class Mark(Protocol):
    """A place in the order of a stream's work."""

    @property
    def is_done(self) -> bool:
        """Whether everything before it has happened."""
        ...

    def wait(self) -> None:
        """Let the host wait for it."""
        ...


class Copy(Mark, Protocol):
    """The end of one copy to the device."""

    nbytes: int

    @property
    def seconds(self) -> float:
        """Copy time in seconds, waiting excluded. Valid once `is_done`."""
        ...


class Lane(Protocol):
    """A device with a compute stream, which is also the model's own, and a copy stream."""

    device: torch.device

    def available_bytes(self) -> int:
        """What this process may hope to use on the device in total: what is free, and what it has."""
        ...

    def limit(self, nbytes: int) -> None:
        """Let allocations fail rather than exceed this."""
        ...

    def peak_bytes(self) -> int:
        """The most that was allocated."""
        ...

    def pool(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Device memory that both streams may use from now on."""
        ...

    def peer_pool(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of another device, to and from which `copy_in` copies too.

        Raises:
            ValueError: if there is none.
        """
        ...

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Pinned host memory; it may be dropped while work that uses it is queued."""
        ...

    def pin(self, memory: torch.Tensor) -> bool:
        """Pin host memory that was allocated elsewhere; False if the system refuses, and copies from it are slower."""
        ...

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo `pin`."""
        ...

    def launch(self, work: Callable[[], object]) -> None:
        """Queue work on the compute stream."""
        ...

    def hand_over(self, work: Callable[[], Result]) -> Result:
        """Queue work on the compute stream whose result leaves the tier."""
        ...

    def mark(self) -> Mark:
        """The present end of the compute stream."""
        ...

    def copy_in(self, pairs: Pairs, after: Mark | None) -> Copy:
        """Queue copies on the copy stream, once `after` has been reached: from host or peer memory to the device's, or
        from the device's to the peer's."""
        ...

    def drain(self) -> None:
        """Let the host wait until both streams have done everything that was queued."""
        ...

    def compute_after(self, copy: Copy) -> None:
        """Let what is launched from now on wait for a copy."""
        ...
