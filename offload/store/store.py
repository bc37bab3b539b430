"""The SSD tier: reads one expert of one layer into a slot, straight from the checkpoint's own files."""

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from xxhash import xxh3_64, xxh3_64_hexdigest

from ..checkpoint.tensors import TensorEntry, read_into
from ..formats.form import BLOCK_BYTES, Extent, Form
from ..formats.lossy.levelled import LevelledForm
from ..memory.huge_pages import huge_mapping, huge_pages, small_pages
from .reading import ReadingThreads, Ticket

READ_BYTES = 4 << 20
"""Shorter reads cost more system calls, longer ones leave threads without work: an expert of 16 MiB is read by four at
once. `calibrate` measures the disk with this length; other lengths have no record."""
AHEAD_READ_BYTES = 1 << 20
"""Reads that may not be needed are short, because one that is needed waits for those that have begun."""
MADV_POPULATE_WRITE = 23
"""Linux 5.14 and later; the mmap module does not name it."""


class Slots:
    """A pool of block-aligned slots in one anonymous mapping, whose memory is taken at once.

    Reading with O_DIRECT into pages that do not exist yet is ten times slower than into pages that do. Each read would
    wait for the kernel to find and clear huge pages.

    Args:
        num_slots: how many.
        slot_bytes: of each, or of all alike.
        guard_bytes: after the last.
        num_held: slots that have memory, if not all; `hold` changes how many.
    """

    def __init__(
        self, num_slots: int, slot_bytes: int | Sequence[int], guard_bytes: int = 0, num_held: int | None = None
    ) -> None:
        sizes = [slot_bytes] * num_slots if isinstance(slot_bytes, int) else slot_bytes
        self._starts = [0, *accumulate(sizes)]
        # a mapping has at least a byte, and a layer may have slots for no plane
        self._mapping = huge_mapping(max(self._starts[-1] + guard_bytes, 1))
        self.bytes = memoryview(self._mapping)
        self.tensor = torch.frombuffer(self._mapping, dtype=torch.uint8)
        if num_held is None:
            self._populate(0, len(self._mapping))
        else:
            self.hold(num_held)

    def hold(self, num_slots: int) -> None:
        """Have memory for the first so many slots, and none for the others, which nothing may use."""
        end, whole = self._starts[num_slots], len(self._mapping)
        if end < whole:
            # a huge page that began before `end` would reach beyond it, and be in no budget
            small_pages(self._mapping, end, whole - end)
            self._mapping.madvise(mmap.MADV_DONTNEED, end, whole - end)
        if end:
            huge_pages(self._mapping, 0, end)
            self._populate(0, end)

    def _populate(self, start: int, nbytes: int) -> None:
        try:
            self._mapping.madvise(MADV_POPULATE_WRITE, start, nbytes)
        except OSError:
            # an older kernel: a write to a page takes it, too
            self.tensor[start : start + nbytes : mmap.PAGESIZE] += 0

    def give_back(self) -> None:
        """Give the memory back to the system now; what is read later is zeros."""
        self._mapping.madvise(mmap.MADV_DONTNEED)

    def slot(self, index: int) -> torch.Tensor:
        return self.tensor[self._starts[index] : self._starts[index + 1]]

    def raw(self, index: int) -> memoryview:
        return self.bytes[self._starts[index] : self._starts[index + 1]]


class ExpertStore:
    """Reads experts by layer and id.

    Args:
        model: the model whose experts these are; conversions look at its config.
        forms: how each layer's experts are stored, and where.
        num_threads: reads in flight at most.
        is_direct: read with O_DIRECT, past the page cache.
        read_bytes: one read is at most this long; longer extents are split and read in parallel.
        checksums: XXH3 of each expert of the first layers, hexadecimal; every expert is compared when it is first read.
        level_checksums: of experts in levels, the XXH3 up to the end of each level.
    """

    def __init__(
        self,
        model: Any,
        forms: Sequence[Form],
        *,
        num_threads: int = 4,
        is_direct: bool = False,
        read_bytes: int = READ_BYTES,
        checksums: Sequence[Sequence[str]] | None = None,
        level_checksums: Sequence[Sequence[Sequence[str]]] | None = None,
    ) -> None:
        self._checksums, self._level_checksums = checksums, level_checksums
        self._checked: set[tuple[int, int]] = set()
        self._checked_levels: set[tuple[int, int, int]] = set()
        self.forms = list(forms)
        self.is_direct = is_direct
        self.read_bytes = read_bytes
        self._model = model
        self._files: dict[Path, int] = {}
        self._bounce = threading.local()
        self._threads = ReadingThreads(num_threads)
        self._open_files()

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one read was on its way, since the store was opened."""
        return self._threads.busy_s

    def close(self) -> None:
        """Stop the threads and close the files."""
        # in this order: a thread must not read from a descriptor that is closed, or that another file has by now
        self._threads.close()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def __del__(self) -> None:
        # without threads if the constructor failed
        if hasattr(self, "_threads"):
            self.close()

    def read(
        self, layer: int, expert: int, slot: int, slots: Slots, landed: "SimpleQueue[Ticket]", *, is_demand: bool = True
    ) -> tuple[Ticket, tuple[int, ...]]:
        """Start reading an expert into a slot.

        Returns:
            The ticket, which appears in `landed` when the expert is complete, and how far each region will be shifted.
        """
        form = self.forms[layer]
        if not form.is_straight:
            target = slots.slot(slot)
            jobs: list[Callable[[], None]] = [lambda: form.convert(expert, target, self._model, self._part)]
            shifts = (0,) * len(form.regions)
        else:
            extents = form.extents(expert)
            shifts = form.shifts(extents) if self.is_direct and form.is_shiftable else (0,) * len(form.regions)
            read_bytes = self.read_bytes if is_demand else min(self.read_bytes, AHEAD_READ_BYTES)
            raw = slots.raw(slot)
            jobs = [job for extent in extents for job in self._jobs(extent, shifts, raw, read_bytes)]
        check = self._check_of(layer, expert, slots.slot(slot))
        ticket = Ticket(layer, expert, slot, len(jobs), landed, check)
        self._threads.submit(ticket, jobs, is_demand=is_demand)
        return ticket, shifts

    def read_rows(
        self, layer: int, rows: Sequence[int], places: Sequence[int], slots: Slots, *, is_demand: bool
    ) -> Ticket:
        """Start reading rows of a table, each to a slot of just its bytes.

        Args:
            layer: number of the table among the forms; each of its experts is a row.
            rows: their numbers, one or more.
            places: the slot of each.
            slots: a pool of slots of the form's `expert_bytes`.
            is_demand: whether they are needed now.

        Returns:
            One ticket for all.
        """
        form = self.forms[layer]
        extents = [(extent, place) for row, place in zip(rows, places, strict=True) for extent in form.extents(row)]
        unshifted = (0,) * len(form.regions)
        jobs = [
            job for each, place in extents for job in self._jobs(each, unshifted, slots.raw(place), self.read_bytes)
        ]
        ticket = Ticket(layer, rows[0], places[0], len(jobs), SimpleQueue())
        self._threads.submit(ticket, jobs, is_demand=is_demand)
        return ticket

    def read_level(
        self,
        layer: int,
        expert: int,
        level: int,
        place: tuple[Slots, int],
        landed: "SimpleQueue[Ticket]",
        *,
        is_demand: bool,
        urgency: float = 0.0,
    ) -> tuple[Ticket, torch.Tensor]:
        """Start reading one level of an expert that is stored in levels, beyond the first.

        Args:
            place: a pool of slots of `LevelledForm.level_room`, and which of them.
            urgency: among reads that are not needed now, the largest come first.

        Returns:
            The ticket, which appears in `landed`, and the level's bytes, which are there by then.
        """
        form, (slots, slot) = self.forms[layer], place
        assert isinstance(form, LevelledForm)
        extent = form.level_extent(expert, level)
        shift = extent.offset % BLOCK_BYTES if self.is_direct else 0
        read_bytes = self.read_bytes if is_demand else min(self.read_bytes, AHEAD_READ_BYTES)
        jobs = self._jobs(extent, (shift,), slots.raw(slot), read_bytes)
        ticket = Ticket(layer, expert, slot, len(jobs), landed)
        self._threads.submit(ticket, jobs, is_demand=is_demand, urgency=urgency)
        return ticket, slots.slot(slot)[shift : shift + extent.nbytes]

    def check_levels(self, layer: int, expert: int, levels: Sequence[torch.Tensor]) -> None:
        """Compare the first levels of an expert with their checksum, once.

        Raises:
            OSError: if they differ.
        """
        key = (layer, expert, len(levels))
        if self._level_checksums is None or key in self._checked_levels:
            return
        found = xxh3_64()
        for level in levels:
            found.update(level.numpy())
        if found.hexdigest() != self._level_checksums[layer][expert][len(levels) - 1]:
            raise OSError(
                f"{self.forms[layer].file_of(expert)}: level {len(levels)} of expert {expert} of MoE layer {layer} has "
                "another checksum: the packed copy is damaged, make it again with `expertier pack`"
            )
        self._checked_levels.add(key)

    def quiesce(self) -> None:
        """Give up everything that is on its way; when this returns, nothing is written to any slot.

        Raises:
            TimeoutError: if a read does not end.
        """
        self._threads.quiesce()

    def promote(self, ticket: Ticket) -> None:
        """Read this one before anything that is not needed yet."""
        self._threads.promote(ticket)

    def _check_of(self, layer: int, expert: int, slot: torch.Tensor) -> Callable[[], None] | None:
        # behind the layers of a packed copy stand those that are streamed from the checkpoint
        if self._checksums is None or layer >= len(self._checksums):
            return None
        form = self.forms[layer]
        expected, data = self._checksums[layer][expert], slot[: form.stored_bytes(expert)]

        # Reading threads share `_checked` without a lock: adding is atomic, and the worst is that an expert is compared
        # twice. Once is enough otherwise: what can be damaged is the file, not the way from it.
        def check() -> None:
            if (layer, expert) not in self._checked:
                found = xxh3_64_hexdigest(data.numpy())
                if found != expected:
                    raise OSError(
                        f"{form.file_of(expert)}: checksum {found} instead of {expected}: "
                        "the packed copy is damaged, make it again with `expertier pack`"
                    )
                self._checked.add((layer, expert))
            form.check(expert, slot)

        return check

    def _open_files(self) -> None:
        for file in {file for form in self.forms for file in form.files}:
            self._files[file] = self._open(file)

    def expect_open(self) -> None:
        """Refuse after `close`.

        Raises:
            RuntimeError: if the store is closed.
        """
        if not self._files:
            raise RuntimeError("this model was closed (model.offload.close()); load it again")

    def _descriptor(self, file: Path) -> int:
        self.expect_open()
        return self._files[file]

    def _open(self, file: Path) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        # forms that convert read single tensors into memory that is not aligned, which O_DIRECT refuses
        if self.is_direct and all(form.is_straight for form in self.forms):
            try:
                return os.open(file, flags | os.O_DIRECT)
            except OSError as error:
                raise ValueError(
                    f'{file}: this file system does not read with O_DIRECT ({error.strerror}); use io="cached"'
                ) from error
        return os.open(file, flags)

    def _jobs(
        self, extent: Extent, shifts: Sequence[int], raw: memoryview, read_bytes: int
    ) -> list[Callable[[], None]]:
        """One read per `read_bytes` of the extent."""
        if self.is_direct:
            return self._direct_jobs(extent, shifts, raw, read_bytes)
        descriptor, jobs = self._descriptor(extent.entry.file), []
        for start in range(0, extent.nbytes, read_bytes):
            count = min(read_bytes, extent.nbytes - start)
            target = raw[extent.target + start : extent.target + start + count]
            jobs.append(_bind(read_into, extent.entry.file, descriptor, extent.offset + start, target))
        return jobs

    def _direct_jobs(
        self, extent: Extent, shifts: Sequence[int], raw: memoryview, read_bytes: int
    ) -> list[Callable[[], None]]:
        """Reads past the page cache: file offset, length and address have to be multiples of a block.

        An extent begins anywhere in its file. If the slot's region is shifted by the same remainder and has room for
        whole blocks, they go straight to their place. Otherwise they go through a buffer, and the wanted part is
        copied.
        """
        descriptor, jobs = self._descriptor(extent.entry.file), []
        begin = extent.offset // BLOCK_BYTES * BLOCK_BYTES
        end = extent.offset + extent.nbytes
        has_room = extent.target + -(-(end - begin) // BLOCK_BYTES) * BLOCK_BYTES <= len(raw)
        is_shifted = shifts[extent.region] == extent.offset % BLOCK_BYTES and extent.target % BLOCK_BYTES == 0
        is_straight = is_shifted and has_room
        for start in range(begin, end, read_bytes):
            stop = min(start + read_bytes, end)
            if is_straight:
                first = extent.target + start - begin
                length = -(-(stop - start) // BLOCK_BYTES) * BLOCK_BYTES
                jobs.append(
                    _bind(_read_blocks, extent.entry.file, descriptor, start, raw[first : first + length], stop - start)
                )
            else:
                first = extent.target + max(start, extent.offset) - extent.offset
                target = raw[first : first + stop - max(start, extent.offset)]
                jobs.append(_bind(self._read_bounced, extent, descriptor, start, stop, target))
        return jobs

    def _read_bounced(self, extent: Extent, descriptor: int, start: int, stop: int, target: memoryview) -> None:
        """Read whole blocks into this thread's own buffer and copy the wanted part out."""
        # one for each thread, because several read at the same time; a mapping, because it begins at a page
        if not hasattr(self._bounce, "buffer"):
            self._bounce.buffer = Slots(1, self.read_bytes + BLOCK_BYTES).raw(0)
        length = -(-(stop - start) // BLOCK_BYTES) * BLOCK_BYTES
        buffer = self._bounce.buffer[:length]
        _read_blocks(extent.entry.file, descriptor, start, buffer, stop - start)
        skip = max(start, extent.offset) - start
        target[:] = buffer[skip : skip + len(target)]

    def _part(self, entry: TensorEntry, offset: int, nbytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        raw = torch.empty(nbytes, dtype=torch.uint8)
        read_into(entry.file, self._descriptor(entry.file), offset, memoryview(raw.numpy()))
        return raw.view(entry.torch_dtype()).view(shape)


def _bind(function: Callable[..., None], *arguments: Any) -> Callable[[], None]:
    return lambda: function(*arguments)


def _read_blocks(file: Path, descriptor: int, offset: int, target: memoryview, needed: int) -> None:
    """Read whole blocks; the last block of a file may be cut short, but not before `needed` bytes."""
    done = 0
    while done < needed:
        try:
            count = os.preadv(descriptor, [target[done:]], offset + done)
        except OSError as error:
            raise OSError(error.errno, f"{file}: reading {len(target)} bytes at {offset}: {error.strerror}") from error
        reached = done + count
        # A short read ends within a block at the end of the file only. Going on from there would not be aligned: the
        # block is read again from its beginning, and one that brings nothing new is the end of a file that was cut.
        if reached < needed and reached // BLOCK_BYTES * BLOCK_BYTES == done:
            raise OSError(
                f"{file}: the file ends at byte {offset + reached}, {needed - reached} bytes short; "
                "it was truncated or replaced while it was in use"
            )
        done = reached if reached >= needed else reached // BLOCK_BYTES * BLOCK_BYTES
