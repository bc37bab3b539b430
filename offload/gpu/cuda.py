"""The one file that calls CUDA: streams, events, pinned memory."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from .lanes import Mark, Pairs, Result
from .plan.budget import CONTEXT_BYTES


class CudaMark:
    """An event."""

    def __init__(self, event: Any) -> None:
        self.event = event

    @property
    def is_done(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()


class CudaCopy(CudaMark):
    """Two events around a copy."""

    def __init__(self, started: Any, done: Any, nbytes: int) -> None:
        super().__init__(done)
        self._started, self.nbytes = started, nbytes

    @property
    def seconds(self) -> float:
        return float(self._started.elapsed_time(self.event)) / 1e3


class CudaLane:
    """torch's current CUDA device: the compute stream is whatever stream the model runs on.

    Raises:
        ValueError: if there is no CUDA device.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise ValueError('device="cuda": torch finds no CUDA device here; use device="cpu"')
        self.device = torch.device("cuda", torch.cuda.current_device())
        torch.zeros((), device=self.device)
        self._copies = torch.cuda.Stream(self.device)

    def available_bytes(self) -> int:
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(free) + torch.cuda.memory_reserved(self.device) + CONTEXT_BYTES

    def limit(self, nbytes: int) -> None:
        _, total = torch.cuda.mem_get_info(self.device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(nbytes - CONTEXT_BYTES, 1) / total), self.device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self.device) + CONTEXT_BYTES

    def pool(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        memory = torch.empty(shape, dtype=dtype, device=self.device)
        # the allocator may have given memory that queued kernels still use
        torch.cuda.synchronize(self.device)
        return memory

    def peer_pool(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        others = [number for number in range(torch.cuda.device_count()) if number != self.device.index]
        if not others:
            raise ValueError("peer memory is another GPU's, and torch finds one GPU only; leave out --peer-memory")
        roomiest = max(others, key=lambda number: torch.cuda.mem_get_info(number)[0])
        return torch.empty(shape, dtype=dtype, device=torch.device("cuda", roomiest))

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def pin(self, memory: torch.Tensor) -> bool:
        if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0:
            return True
        # CUDA remembers the refusal and would report it as the error of the next kernel
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self.device).add_(1)
        return False

    def unpin(self, memory: torch.Tensor) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())

    def launch(self, work: Callable[[], object]) -> None:
        work()

    def hand_over(self, work: Callable[[], Result]) -> Result:
        return work()

    def mark(self) -> CudaMark:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return CudaMark(event)

    def copy_in(self, pairs: Pairs, after: Mark | None) -> CudaCopy:
        # the source must not change before `done`: RAM slots that a copy reads are lent (ram_feed.py)
        started, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._copies):
            # the copy stream waits, not the host; and before `started`, so that waiting does not count as copying
            if isinstance(after, CudaMark):
                self._copies.wait_event(after.event)
            started.record(self._copies)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            done.record(self._copies)
        return CudaCopy(started, done, sum(source.nbytes for _, source in pairs))

    def drain(self) -> None:
        torch.cuda.synchronize(self.device)

    def compute_after(self, copy: CudaCopy) -> None:
        torch.cuda.current_stream(self.device).wait_event(copy.event)
