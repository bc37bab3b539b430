"""How fast a disk takes records: the rate that bounds methods that change experts."""

import os
import tempfile
import time
from pathlib import Path

PIECE_BYTES, MEASURED_BYTES = 8 << 20, 1 << 30
"""A record has some megabytes; a gigabyte is more than most disks keep in a cache of their own. Not tuned."""


def write_bandwidth(folder: Path, total_bytes: int = MEASURED_BYTES) -> float:
    """Bytes per second that a new file in a folder takes, until it is forced to the disk.

    Args:
        folder: on the disk in question; needs `total_bytes` for as long.
        total_bytes: at least one piece.
    """
    piece = os.urandom(PIECE_BYTES)
    with tempfile.TemporaryFile(dir=folder) as file:
        count, started = max(total_bytes // PIECE_BYTES, 1), time.perf_counter()
        for number in range(count):
            os.pwrite(file.fileno(), piece, number * PIECE_BYTES)
        os.fsync(file.fileno())
        return count * PIECE_BYTES / (time.perf_counter() - started)
