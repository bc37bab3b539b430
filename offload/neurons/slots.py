"""Units of one layer in memory: those of the last tokens stay, and only the difference is read.

Source: Alizadeh et al. 2023 (LLM in a flash), arXiv:2312.11514, section 3.1: the sliding window and the bundled rows
and columns. There the window is a number of tokens; here it is as many as the slots hold.

The experts of a layer share its slots: which of them need many is up to the text.

Shapes: F hidden units of the layer, C slots, n units of a call, m units that were not there, R rows of the work memory,
P units of one piece of a call with zeros, W = parts times D numbers of a unit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .bundle import BundledLayer
from .reader import BundleReader
from .unit_layer import rounded

COPIED_BYTES = 1 << 20
"""Of rows that are copied at once: torch has them in memory twice, and these stay in the caches."""


def expect_no_gradient(*tensors: torch.Tensor) -> None:
    """Refuse a call whose gradients would need weights that are overwritten by then.

    Raises:
        RuntimeError: if one of the tensors wants a gradient.
    """
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError("gradients do not pass through bundled units; run the model under torch.no_grad()")


@dataclass
class UnitCounters:
    """Counts of one layer since loading or `reset`.

    `calls` asked for `chosen` of the `visited` units, which are those of the feed-forward, or of each expert that a
    token went to. `active` ones of them were not zero for some token; `read` ones came from disk.
    """

    calls: int = 0
    visited: int = 0
    chosen: int = 0
    active: int = 0
    read: int = 0


class UnitSlots:
    """The slots of one layer. One thread at a time calls it.

    Args:
        layer: where its units are.
        reader: reads them.
        num_slots: units that stay; 0 reads all that a call needs.
        work_RW: memory for the units of one call, shared by all layers.
    """

    def __init__(self, layer: BundledLayer, reader: BundleReader, num_slots: int, work_RW: torch.Tensor) -> None:
        self.layer, self.reader, self._work_RW = layer, reader, work_RW
        self._unit_CW = torch.zeros(num_slots, work_RW.shape[1], dtype=work_RW.dtype)
        self.counters = UnitCounters()
        self.clear()

    @property
    def most_rows(self) -> int:
        """Of the work memory: pieces of a call take a round number each."""
        return len(self._work_RW)

    def clear(self) -> None:
        """Forget all units."""
        self._slot_F = np.full(self.layer.num_units, -1, np.int64)
        self._unit_C = np.full(len(self._unit_CW), -1, np.int64)
        self._used_C = np.full(len(self._unit_CW), -1, np.int64)
        self._time = 0
        self._is_whole = True

    def gather(self, pieces: Sequence[NDArray[np.int64]]) -> list[torch.Tensor]:
        """[P, W] for each piece: its units, then zeros; the next call of any layer overwrites them.

        Args:
            pieces: numbers of units, rising from the first of the first piece to the last of the last. Rounded, they
                are no more than `most_rows` together.

        Raises:
            OSError: if reading fails.
        """
        if not self._is_whole:  # an exception cut an earlier call short
            self.clear()
        self._is_whole = False
        self._time += 1
        self.reader.turn += 1
        rows = [rounded(len(piece)) for piece in pieces]
        padded_PW = list(self._work_RW[: sum(rows)].split(rows))
        starts = np.cumsum([0, *rows[:-1]])
        unit_n = np.concatenate(pieces)
        row_n = np.concatenate([start + np.arange(len(piece)) for start, piece in zip(starts, pieces, strict=True)])
        missing_n = self._copy_those_here(unit_n, row_n)
        self.reader.read(self.layer, unit_n[missing_n], row_n[missing_n], self._work_RW)
        self._keep(unit_n[missing_n], row_n[missing_n])
        for piece, one_PW in zip(pieces, padded_PW, strict=True):
            one_PW[len(piece) :].zero_()
        self.counters.calls += 1
        self.counters.chosen += len(unit_n)
        self.counters.read += len(missing_n)
        self._is_whole = True
        return padded_PW

    def _copy_those_here(self, unit_n: NDArray[np.int64], row_n: NDArray[np.int64]) -> NDArray[np.int64]:
        """Copy units from their slots into the work memory; gives which of them have none."""
        slot_n = self._slot_F[unit_n]
        is_here_n = slot_n >= 0
        _copy_rows(self._unit_CW, slot_n[is_here_n], self._work_RW, row_n[is_here_n])
        self._used_C[slot_n[is_here_n]] = self._time
        return np.flatnonzero(~is_here_n)

    def expect_turn(self, turn: int) -> None:
        """Refuse memory that another call has overwritten since it was gathered.

        Args:
            turn: `reader.turn` as it was then.

        Raises:
            RuntimeError: if one has.
        """
        if turn != self.reader.turn:
            raise RuntimeError("a model with bundled units was called within another of its calls; call it in turn")

    def _keep(self, unit_m: NDArray[np.int64], row_m: NDArray[np.int64]) -> None:
        """Give slots to what was read: those of units that were not used for longest, none that is used now."""
        slot_m = self._oldest(len(unit_m))
        unit_m = unit_m[: len(slot_m)]
        gone_m = self._unit_C[slot_m]
        self._slot_F[gone_m[gone_m >= 0]] = -1
        _copy_rows(self._work_RW, row_m[: len(slot_m)], self._unit_CW, slot_m)
        self._unit_C[slot_m], self._slot_F[unit_m], self._used_C[slot_m] = unit_m, slot_m, self._time

    def _oldest(self, count: int) -> NDArray[np.int64]:
        """So many slots that are not used now, or all of them; experts have many, so they are not sorted."""
        free = np.flatnonzero(self._used_C < self._time)
        if count >= len(free):
            return free
        return free[np.argpartition(self._used_C[free], count)[:count]]

    def report(self) -> dict[str, Any]:
        """Counts, JSON-serialisable."""
        return {"slots": len(self._unit_C), **vars(self.counters)}


def _copy_rows(
    source_RW: torch.Tensor, from_m: NDArray[np.int64], target_RW: torch.Tensor, to_m: NDArray[np.int64]
) -> None:
    """Copy rows of one memory to rows of another, a few at a time."""
    few = max(1, COPIED_BYTES // (source_RW.shape[1] * source_RW.itemsize))
    source_m, target_m = torch.from_numpy(from_m), torch.from_numpy(to_m)
    for start in range(0, len(from_m), few):
        target_RW[target_m[start : start + few]] = source_RW[source_m[start : start + few]]
