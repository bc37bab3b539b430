"""A device that is not there: its work is done by the processor, and two clocks say what its wire would have cost.

Whatever is queued is done at once, so bits are right whatever the clocks say. The first clock is the model's: the time
of the processor, without the copying, plus what it has waited for copies. The second is the wire's. A copy begins when
the one before it has ended and what it waits for has been reached. It takes its bytes over the wire's rate.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..memory.budget import available_memory
from .lanes import Copy, Mark, Pairs, Result

WIRE_BYTES_PER_S = 16e9
"""Of PCIe 4.0 with eight lanes, or of 3.0 with sixteen, in one direction."""


@dataclass(eq=False)
class SimulatedMark:
    """A time on the model's clock that has been reached."""

    at_s: float

    @property
    def is_done(self) -> bool:
        return True

    def wait(self) -> None:
        """There is nothing to wait for."""


@dataclass(eq=False)
class SimulatedCopy:
    """A copy that ends at `at_s`."""

    lane: "SimulatedLane"
    at_s: float
    nbytes: int
    seconds: float

    @property
    def is_done(self) -> bool:
        return self.lane.now_s() >= self.at_s

    def wait(self) -> None:
        self.lane.wait_until(self.at_s)


class SimulatedLane:
    """The processor behind a wire.

    Attributes:
        stall_s: seconds that the model has waited for copies.
    """

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.stall_s = 0.0
        self._copying_s, self._wire_free_s, self._pool_bytes = 0.0, 0.0, 0

    def now_s(self) -> float:
        """The model's clock."""
        return time.perf_counter() - self._copying_s + self.stall_s

    def wait_until(self, at_s: float) -> None:
        """Let the model's clock be at least this."""
        self.stall_s += max(at_s - self.now_s(), 0.0)

    def available_bytes(self) -> int:
        return available_memory()

    def limit(self, nbytes: int) -> None:
        """The processor's memory has the process's own budget."""

    def peak_bytes(self) -> int:
        return self._pool_bytes

    def pool(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        memory = torch.zeros(shape, dtype=dtype)
        self._pool_bytes += memory.nbytes
        return memory

    def peer_pool(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    def pin(self, memory: torch.Tensor) -> bool:
        return True

    def unpin(self, memory: torch.Tensor) -> None:
        """Nothing was pinned."""

    def launch(self, work: Callable[[], object]) -> None:
        work()

    def hand_over(self, work: Callable[[], Result]) -> Result:
        return work()

    def mark(self) -> SimulatedMark:
        return SimulatedMark(self.now_s())

    def copy_in(self, pairs: Pairs, after: Mark | None) -> SimulatedCopy:
        begin_s = max(self.now_s(), self._wire_free_s, after.at_s if isinstance(after, SimulatedMark) else 0.0)
        started = time.perf_counter()
        for target, source in pairs:
            target.copy_(source)
        self._copying_s += time.perf_counter() - started
        nbytes = sum(source.nbytes for _, source in pairs)
        self._wire_free_s = begin_s + nbytes / WIRE_BYTES_PER_S
        return SimulatedCopy(self, self._wire_free_s, nbytes, nbytes / WIRE_BYTES_PER_S)

    def drain(self) -> None:
        self.wait_until(self._wire_free_s)

    def compute_after(self, copy: Copy) -> None:
        copy.wait()
