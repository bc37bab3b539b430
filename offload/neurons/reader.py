"""Reads units of a bundle by several threads, neighbours in one piece.

Shapes: m units to read, R rows of the target, W numbers of a unit.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from .bundle import Bundle, BundledLayer

RUN_BYTES = 1 << 20
"""One read is at most this long, so that several threads share a long run of units. Not tuned."""


class BundleReader:
    """Reads units by several threads, neighbours in one piece, through the page cache.

    Args:
        bundle: where each feed-forward's units are; its file stays open until `close`.
        num_threads: reads in flight at most.
    """

    def __init__(self, bundle: Bundle, num_threads: int) -> None:
        self._file = bundle.file
        self._descriptor: int | None = os.open(bundle.file, os.O_RDONLY)
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="expertier-units")
        self.bytes_read = 0
        self.turn = 0
        """Counts calls of layers, which share the memory that is read into."""

    def close(self) -> None:
        """Stop the threads and close the file."""
        self._threads.shutdown()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def read(
        self, layer: BundledLayer, unit_m: NDArray[np.int64], place_m: NDArray[np.int64], target_RW: torch.Tensor
    ) -> None:
        """Read units into rows of a target, and wait for them.

        Args:
            layer: whose units.
            unit_m, place_m: numbers of units and of rows, both rising.
            target_RW: contiguous.

        Raises:
            OSError: if the file is shorter than it was, or the disk fails.
            RuntimeError: if the reader is closed.
        """
        if self._descriptor is None:
            raise RuntimeError("this model was closed; load it again")
        if not len(unit_m):
            return
        memory = memoryview(target_RW.view(torch.uint8).numpy()).cast("B")
        runs = list(_runs(unit_m, place_m, layer.of.unit_bytes))
        # a list of reads for each thread: handing over a hundred short ones takes longer than reading them
        shares = [runs[start :: self._num_threads] for start in range(min(self._num_threads, len(runs)))]
        jobs = [self._threads.submit(self._read_share, layer, share, memory) for share in shares]
        for job in jobs:
            job.result()
        self.bytes_read += len(unit_m) * layer.of.unit_bytes

    def _read_share(self, layer: BundledLayer, runs: Sequence[tuple[int, int, int]], memory: memoryview) -> None:
        for first, place, nbytes in runs:
            self._run(layer, first, memory[place : place + nbytes])

    def _run(self, layer: BundledLayer, first: int, target: memoryview) -> None:
        assert self._descriptor is not None
        offset = layer.offset + first * layer.of.unit_bytes
        done = os.preadv(self._descriptor, [target], offset)
        while 0 < done < len(target):
            more = os.preadv(self._descriptor, [target[done:]], offset + done)
            done = done + more if more else -1
        if done != len(target):
            raise OSError(f"{self._file} ends within the units of {layer.of.name}; it was changed while it was open")


def _runs(unit_m: NDArray[np.int64], place_m: NDArray[np.int64], unit_bytes: int) -> Iterator[tuple[int, int, int]]:
    """First unit, place in the target and length in bytes of each piece whose units and places are neighbours."""
    breaks = np.flatnonzero((np.diff(unit_m) != 1) | (np.diff(place_m) != 1)) + 1
    most = max(RUN_BYTES // unit_bytes, 1)
    for start, stop in zip([0, *breaks], [*breaks, len(unit_m)], strict=True):
        for piece in range(start, stop, most):
            count = min(most, stop - piece)
            yield int(unit_m[piece]), int(place_m[piece]) * unit_bytes, count * unit_bytes
