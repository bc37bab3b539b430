"""Measure what lies between host and GPU, and how fast the GPU reads its own memory."""

import time
from statistics import median

import torch

from ..gpu.devices import LANES
from ..gpu.lanes import Lane

# large enough that starting a copy or a kernel does not count, and larger than a GPU's cache
PIECE_BYTES = 64 << 20
# measurements; the median of nine bears four slow ones
TIMES = 9


def gpu_rates() -> dict[str, float]:
    """The GPU's fields of `Hardware`; none without a GPU."""
    try:
        lane = LANES["cuda"]()
    except ValueError:
        return {}
    return {"pcie_bytes_per_s": wire_bandwidth(lane), "gpu_bytes_per_s": read_bandwidth(lane)}


def wire_bandwidth(lane: Lane, piece_bytes: int = PIECE_BYTES) -> float:
    """Bytes per second of copies from pinned host memory to the device."""
    source = lane.host((piece_bytes,), torch.uint8).fill_(1)
    target = lane.pool((piece_bytes,), torch.uint8)
    seconds = []
    for _ in range(TIMES):
        copy = lane.copy_in([(target, source)], None)
        copy.wait()
        seconds.append(copy.seconds)
    return piece_bytes / median(seconds)


def read_bandwidth(lane: Lane, piece_bytes: int = PIECE_BYTES) -> float:
    """Bytes per second at which kernels read device memory."""
    memory = lane.pool((16, piece_bytes // 4), torch.float32).zero_()
    seconds = []
    for _ in range(TIMES):
        started = time.perf_counter()
        lane.launch(lambda: memory.sum(dim=1))
        lane.mark().wait()
        seconds.append(time.perf_counter() - started)
    return memory.nbytes / median(seconds)
