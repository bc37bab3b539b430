"""Experts that have changed, each in a record on the disk beside the checkpoint, which is never written to.

A record is written to a place that the last commit does not use. So a commit stays whole whatever happens after it:
a process that is killed, a disk that is full. Places that a commit no longer uses are free from then on.

Records may be written behind, by a thread, from rooms that are used again. Whoever asks for one of those waits for it.
"""

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from xxhash import xxh3_64, xxh3_64_hexdigest

from ...checkpoint.tensors import TensorEntry, read_into
from ...formats.form import BLOCK_BYTES
from ...store.store import Slots

Key = tuple[int, int]
"""(MoE layer, expert)."""


@dataclass(frozen=True)
class Place:
    """Where a record is: its number in the layer's file, the step that it is of, and the XXH3 of its bytes."""

    number: int
    step: int
    checksum: str


@dataclass(eq=False)
class _LayerFile:
    path: Path
    descriptor: int
    nbytes: int
    """Of one record."""
    stride: int
    direct: int | None = None
    """The same file past the page cache."""
    count: int = 0
    """Places that the file has."""
    free: list[int] = field(default_factory=list)


class ExpertRecords:
    """The records of all layers.

    Args:
        folder: made if it is not there; one file per layer.
        record_bytes_L: bytes of a record of each layer.
    """

    def __init__(self, folder: Path, record_bytes_L: Sequence[int]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._files = [_open(folder / f"layer_{layer:03}.bin", size) for layer, size in enumerate(record_bytes_L)]
        force_to_disk(folder)
        self._now: dict[Key, Place] = {}
        self._committed: dict[Key, Place] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="expertier-record")
        self._writing: dict[Key, Future[None]] = {}
        self._rooms: deque[tuple[torch.Tensor, Future[None] | None]] = deque()

    def make_rooms(self, count: int, *, is_direct: bool) -> None:
        """Take memory for records that are read and written in place.

        Args:
            count: records that are on their way at a time, at least 1.
            is_direct: read and write them past the page cache, on file systems that can.
        """
        slots = Slots(count, max(file.stride for file in self._files))
        self._rooms = deque((slots.slot(number), None) for number in range(count))
        for file in self._files if is_direct else ():
            file.direct = os.open(file.path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)

    def close(self) -> None:
        """End the thread, close the files."""
        self._writer.shutdown(cancel_futures=True)
        for file in self._files:
            os.close(file.descriptor)
            if file.direct is not None:
                os.close(file.direct)

    def paths(self, layer: int) -> set[Path]:
        """The files of a layer."""
        return {self._files[layer].path}

    def record_bytes(self, layer: int) -> int:
        """Of one record of a layer."""
        return self._files[layer].nbytes

    def place(self, layer: int, expert: int) -> Place | None:
        """Where an expert's record is; None if it has not changed."""
        self._settle((layer, expert))
        return self._now.get((layer, expert))

    @property
    def keys(self) -> list[Key]:
        """Every expert that has a record."""
        self.wait()
        return sorted(self._now)

    def entry(self, layer: int, expert: int) -> TensorEntry | None:
        """An expert's record as the bytes of a file; None if it has none."""
        found = self.place(layer, expert)
        if found is None:
            return None
        file = self._files[layer]
        return TensorEntry(
            f"record[{layer}, {expert}]", file.path, found.number * file.stride, file.nbytes, "U8", (file.nbytes,)
        )

    def write(self, layer: int, expert: int, parts: Sequence[torch.Tensor], step: int) -> None:
        """Write an expert's record.

        Args:
            layer, expert: whose.
            parts: contiguous tensors, one after the other the record's bytes.
            step: the last step that is in it.

        Raises:
            OSError: if the disk is full, or cannot be written to.
        """
        self._settle((layer, expert))
        pieces = [memoryview(part.detach().reshape(-1).view(torch.uint8).numpy()) for part in parts]
        assert sum(map(len, pieces)) == self._files[layer].nbytes
        self._write(layer, expert, pieces, step)

    def room(self) -> torch.Tensor:
        """A room for any record, as bytes; it is the caller's until it is given to `write_behind`.

        Raises:
            OSError: if the record that was in it could not be written.
        """
        room, write = self._rooms.popleft()
        if write is not None:
            write.result()
        return room

    def write_behind(self, layer: int, expert: int, room: torch.Tensor, step: int) -> None:
        """Write an expert's record from the beginning of its room, in a thread; otherwise as `write`."""
        self._settle((layer, expert))
        found = self._writer.submit(self._write_room, layer, expert, room, step)
        self._writing[layer, expert] = found
        self._rooms.append((room, found))

    def give_back(self, room: torch.Tensor) -> None:
        """A room is not written after all."""
        self._rooms.append((room, None))

    def wait(self) -> None:
        """Let all records be written.

        Raises:
            OSError: if one could not be.
        """
        while self._writing:
            self._settle(next(iter(self._writing)))

    def _settle(self, key: Key) -> None:
        """Let one record be written."""
        if (found := self._writing.get(key)) is not None:
            found.result()
            self._writing.pop(key, None)

    def _write_room(self, layer: int, expert: int, room: torch.Tensor, step: int) -> None:
        self._write(layer, expert, [memoryview(room.numpy())[: self._files[layer].nbytes]], step, room)

    def _write(
        self, layer: int, expert: int, pieces: Sequence[memoryview], step: int, room: torch.Tensor | None = None
    ) -> None:
        """Write a record's pieces, past the page cache if they are the beginning of a room of whole blocks."""
        file, key = self._files[layer], (layer, expert)
        before, committed = self._now.get(key), self._committed.get(key)
        is_ours = before is not None and before != committed
        number = before.number if before is not None and is_ours else self._take(file)
        found = xxh3_64()
        for piece in pieces:
            found.update(piece)
        if room is not None and file.direct is not None:
            write_all(file.direct, memoryview(room.numpy())[: file.stride], number * file.stride)
        else:
            _write_at(file, number * file.stride, pieces)
        self._now[key] = Place(number, step, found.hexdigest())

    def read(self, layer: int, expert: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """The bytes of an expert's record, checked.

        Args:
            layer, expert: whose.
            into: a room; None for new memory.

        Raises:
            OSError: if they are not those that were written.
        """
        self._settle((layer, expert))
        file, place = self._files[layer], self._now[layer, expert]
        data, descriptor, count = into, file.direct, file.stride
        if data is None or descriptor is None:
            descriptor, count = file.descriptor, file.nbytes
            data = torch.empty(count, dtype=torch.uint8) if data is None else data
        read_into(file.path, descriptor, place.number * file.stride, memoryview(data.numpy())[:count])
        data = data[: file.nbytes]
        if (found := xxh3_64_hexdigest(data.numpy())) != place.checksum:
            raise OSError(f"{file.path}: expert {expert} has checksum {found} instead of {place.checksum}: damaged")
        return data

    def secure(self) -> dict[str, list[Any]]:
        """Force every record to the disk; the table that a commit has to keep."""
        self.wait()
        for file in self._files:
            os.fsync(file.descriptor)
        return {f"{layer}.{expert}": [p.number, p.step, p.checksum] for (layer, expert), p in self._now.items()}

    def commit(self) -> None:
        """The table of `secure` is safe: places that only the commit before it used are free."""
        self._committed = dict(self._now)
        self._reclaim()

    def restore(self, table: dict[str, list[Any]]) -> None:
        """Continue from the table of a commit.

        Raises:
            ValueError: if the table is none, or its file is shorter than it says.
        """
        try:
            self._now = {
                (int(layer), int(expert)): Place(int(number), int(step), str(checksum))
                for key, (number, step, checksum) in table.items()
                for layer, expert in [key.split(".")]
            }
            for (layer, _), place in self._now.items():
                file = self._files[layer]
                if not place.number >= 0 or os.fstat(file.descriptor).st_size < (place.number + 1) * file.stride:
                    raise ValueError(f"{file.path} ends before record {place.number}")
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError(
                f"the table of records of this run is damaged ({error}); start anew in another --out"
            ) from error
        self.commit()

    def _reclaim(self) -> None:
        for layer, file in enumerate(self._files):
            used = {place.number for (of, _), place in self._now.items() if of == layer}
            file.count = max(file.count, os.fstat(file.descriptor).st_size // file.stride)
            file.free = sorted(set(range(file.count)) - used, reverse=True)

    def _take(self, file: _LayerFile) -> int:
        if not file.free:
            file.free.append(file.count)
            file.count += 1
        return file.free.pop()


def _open(path: Path, nbytes: int) -> _LayerFile:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    return _LayerFile(path, descriptor, nbytes, -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES)


def _write_at(file: _LayerFile, offset: int, pieces: Sequence[memoryview]) -> None:
    """Write a record, and extend the file to the end of its last block, so that whole blocks can be read."""
    end = offset + file.stride
    for piece in pieces:
        write_all(file.descriptor, piece, offset)
        offset += len(piece)
    if os.fstat(file.descriptor).st_size < end:
        os.ftruncate(file.descriptor, end)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Write bytes at a place of a file, however many calls that takes."""
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def force_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
