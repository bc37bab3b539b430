"""What autograd keeps for the backward pass, in memory up to a limit; the rest is on the disk, or computed again.

Experts keep their inputs only and are computed again. Everything else that a layer keeps passes through here. In its
first step a run fills the limit and spills what exceeds it, and measures bytes and seconds of each micro-batch in each
decoder layer. From them it chooses what is kept, spilled and computed again from then on. Bits stay what they are.

Activations of decoder layers may be kept and spilled in 8 bits, which is not exact. What is computed again is, and so
is everything outside layers, such as logits.

Source: Zhao et al. 2024 (MEMO), arXiv:2407.12117; Xi et al. 2024 (COAT), arXiv:2410.19313.
"""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from xxhash import xxh3_128_digest

from ...checkpoint.tensors import read_into
from .activation_plan import StepLoad, UnitCost, choose
from .float8 import decode, encode
from .records import write_all
from .units import UNIT, Choice, Place
from .visits import ExpertVisits, Traffic

LEAST_BYTES = 1 << 14
"""Smaller tensors stay: a read of the disk takes as long for them as for one of this size. Not tuned."""
OPENED = "spilled activations"


@dataclass(frozen=True)
class Spilled:
    """A tensor on the disk.

    Args:
        offset: of its first byte.
        shape, stride: of its elements; they fill their bytes without gaps.
        dtype: of an element.
        place: the unit that kept it; None outside units.
    """

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    place: Place | None = None


@dataclass(frozen=True)
class Coded:
    """A tensor in 8 bits.

    Args:
        codes, scales: as `float8` has them; the codes may be on the disk.
        shape, stride: of its elements; they fill their bytes without gaps.
        dtype: of an element.
    """

    codes: torch.Tensor | Spilled
    scales: torch.Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class SpilledActivations:
    """What the passes of one step keep.

    Args:
        limit_bytes: in memory at most, small tensors and views with gaps not counted.
        folder: where the rest goes, into a file without a name.
        traffic: counts what is written and read.
        resident: tensors that are in memory anyway, such as weights.
        is_coded: whether activations of decoder layers are stored in 8 bits.
    """

    def __init__(
        self,
        limit_bytes: float,
        folder: Path,
        traffic: Traffic,
        resident: Iterable[torch.Tensor],
        *,
        is_coded: bool = False,
    ) -> None:
        self.is_coded = is_coded
        self._codes_now = is_coded
        self._limit_bytes, self._folder, self._traffic = limit_bytes, folder, traffic
        self._resident = {tensor.untyped_storage().data_ptr() for tensor in resident}
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  lives as long as the run
        self._pass: ContextVar[int | None] = ContextVar("expertier_pass", default=None)
        self._choices: dict[Place, Choice] = {}
        self._measured: dict[Place, list[float]] = {}
        self._begin()

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()

    @contextmanager
    def step(self, visits: ExpertVisits) -> Iterator[None]:
        """All passes of a step run within; the first one says what becomes of activations in those after it.

        Args:
            visits: of experts, which share the disk.
        """
        self._begin()
        started = time.perf_counter()
        busy_s, waited_s = visits.disk_busy_s, visits.waited_s
        yield
        self._coded.clear()
        if not self._choices and self.bytes["spilled"] and self._codes_now == self.is_coded:
            compute_s = time.perf_counter() - started - (visits.waited_s - waited_s) - self._moved_s
            rate = self._moved_bytes / self._moved_s
            self._choose(StepLoad(visits.disk_busy_s - busy_s, compute_s, rate))

    @contextmanager
    def of_pass(self, number: int) -> Iterator[None]:
        """What autograd saves within, in this thread, is that of one micro-batch."""
        token = self._pass.set(number)
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self.unpack):
                yield
        finally:
            self._pass.reset(token)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Within, nothing is stored in 8 bits."""
        self._codes_now = False
        try:
            yield
        finally:
            self._codes_now = self.is_coded

    @property
    def current_pass(self) -> int | None:
        """The micro-batch that this thread computes."""
        return self._pass.get()

    def choice(self, place: Place) -> Choice:
        """What becomes of a unit's activations; those that are kept are spilled all the same once the limit is full."""
        return self._used.get(place, "kept")

    def note_unit(self, place: Place, seconds: float, input_bytes: int) -> None:
        """A unit's forward pass took so long, transfers not counted, and began with so many bytes."""
        if place in self._measured:
            self._measured[place][1:] = [seconds, input_bytes]

    def as_metrics(self) -> dict[str, Any]:
        """Bytes of the step that were kept and spilled, and the share of tokens and layers computed again."""
        again = sum(choice == "recomputed" for choice in self._used.values())
        return {
            "activation_bytes_kept": self.bytes["kept"],
            "activation_bytes_spilled": self.bytes["spilled"],
            "activation_share_recomputed": again / max(len(self._used), 1),
        }

    def _begin(self) -> None:
        """A new step: nothing is kept any more."""
        if not self._choices:
            self._measured.clear()
        self._used = self._choices
        self._written: dict[bytes, int] = {}
        self._coded: dict[bytes, tuple[torch.Tensor | Spilled, torch.Tensor]] = {}
        self._counted: set[tuple[int, int, int]] = set()
        self._ranges: dict[Place, tuple[int, int]] = {}
        self._fetched: set[Place] = set()
        self._end = self._moved_bytes = 0
        self._moved_s = 0.0
        self.bytes: Counter[str] = Counter()

    def _choose(self, load: StepLoad) -> None:
        places = sorted(self._measured)
        # what goes in is kept, and as much comes out of experts
        costs = [
            UnitCost(nbytes, 2 * held, seconds) for nbytes, seconds, held in (self._measured[place] for place in places)
        ]
        others = sum(self.bytes.values()) - sum(cost.nbytes for cost in costs)
        self._choices = dict(zip(places, choose(costs, others, self._limit_bytes, load), strict=True))

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | Spilled | Coded:
        is_small = tensor.nbytes < LEAST_BYTES
        if is_small or tensor.untyped_storage().data_ptr() in self._resident or not _is_dense(tensor):
            return tensor
        unit = UNIT.get()
        # what has few numbers of each token, such as logarithms of sums in attention, is small and has to be exact
        is_wide = unit is not None and 2 * tensor.numel() >= unit.num_inputs
        if self._codes_now and is_wide and tensor.is_floating_point():
            return self._code(tensor)
        return self.pack(tensor)

    def _code(self, tensor: torch.Tensor) -> Coded:
        """A tensor in 8 bits; several operations save the same, which is stored once."""
        flat = _flat(tensor)
        digest = xxh3_128_digest(memoryview(flat.view(torch.uint8).numpy()))
        if digest not in self._coded:
            new_codes, new_scales = encode(flat)
            self._coded[digest] = self.pack(new_codes), new_scales
        codes, scales = self._coded[digest]
        return Coded(codes, scales, tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | Spilled:
        """Keep a tensor, whose elements fill their bytes; `unpack` gives it back."""
        unit = UNIT.get()
        key = (tensor.data_ptr(), tensor.nbytes, tensor._version)
        if key in self._counted:
            return tensor
        if unit is not None:
            self._measured.setdefault(unit.place, [0.0, 0.0, 0.0])[0] += tensor.nbytes
        has_room = self.bytes["kept"] + tensor.nbytes <= self._limit_bytes
        if has_room and (unit is None or unit.choice != "spilled"):
            self.bytes["kept"] += tensor.nbytes
            self._counted.add(key)
            return tensor
        flat = _flat(tensor)
        place = None if unit is None else unit.place
        offset = self._write(memoryview(flat.view(torch.uint8).numpy()), place)
        return Spilled(offset, tuple(tensor.shape), tensor.stride(), tensor.dtype, place)

    def _write(self, data: memoryview, place: Place | None) -> int:
        """Where these bytes are: several operations save the same tensor, which is written once."""
        started = time.perf_counter()
        digest = xxh3_128_digest(data)
        if digest not in self._written:
            write_all(self._file.fileno(), data, self._end)
            self._written[digest] = self._end
            if place is not None:
                self._ranges[place] = (self._ranges.get(place, (self._end, 0))[0], self._end + len(data))
            self._end += len(data)
            self.bytes["spilled"] += len(data)
            self._traffic.bytes_written += len(data)
        self._moved(len(data), started)
        return self._written[digest]

    def unpack(self, kept: torch.Tensor | Spilled | Coded) -> torch.Tensor:
        """The tensor that was packed."""
        if isinstance(kept, torch.Tensor):
            return kept
        if isinstance(kept, Coded):
            return decode(self.unpack(kept.codes), kept.scales, kept.dtype).as_strided(kept.shape, kept.stride)
        started = time.perf_counter()
        self._fetch_before(kept.place)
        flat = torch.empty(torch.Size(kept.shape).numel(), dtype=kept.dtype)
        data = memoryview(flat.view(torch.uint8).numpy())
        read_into(self._folder / OPENED, self._file.fileno(), kept.offset, data)
        self._traffic.bytes_read += len(data)
        self._moved(len(data), started)
        return flat.as_strided(kept.shape, kept.stride)

    def _fetch_before(self, place: Place | None) -> None:
        """Ask the kernel for what the layer before this one spilled, while this one computes."""
        if place is None or place in self._fetched:
            return
        self._fetched.add(place)
        layer, number = place
        if (span := self._ranges.get((layer - 1, number))) is not None:
            start, end = span
            os.posix_fadvise(self._file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)

    def _moved(self, nbytes: int, started: float) -> None:
        seconds = time.perf_counter() - started
        self._moved_bytes += nbytes
        self._moved_s += seconds
        if (unit := UNIT.get()) is not None:
            unit.elsewhere_s += seconds


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor without gaps, in the order in which they lie."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their bytes without gaps, in any order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
