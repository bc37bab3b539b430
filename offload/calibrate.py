"""Measure what this machine can do: disk, memory, and how fast one token's products read weights."""

import mmap
import os
import threading
import time
from pathlib import Path

from .record import BLOCK_BYTES

MEASURED_BYTES = 512 << 20


def disk_bandwidth(file: Path, *, num_threads: int, read_bytes: int, total_bytes: int = MEASURED_BYTES) -> float:
    """Bytes per second of O_DIRECT reads of `file` by several threads, each taking every num_threads-th piece."""
    size = file.stat().st_size // BLOCK_BYTES * BLOCK_BYTES
    pieces = range(0, min(size, total_bytes) - read_bytes + 1, read_bytes)
    if not pieces:
        raise ValueError(f"{file} is too small to measure with reads of {read_bytes} bytes")
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)

    def read(first: int) -> None:
        buffer = memoryview(mmap.mmap(-1, read_bytes))
        for offset in pieces[first::num_threads]:
            os.preadv(descriptor, [buffer], offset)

    try:
        threads = [threading.Thread(target=read, args=(first,)) for first in range(num_threads)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(pieces) * read_bytes / (time.perf_counter() - started)
    finally:
        os.close(descriptor)
