"""The window: guests in memory and on their way, in order of use, and rows of embeddings.

A pass enters guest after guest. What it leaves makes room for the next ones to be read, those of the next pass after
the last: reading goes on while layers compute. A pass that does not go on where the last one stopped (layers left out,
an exception, a second thread) starts the window anew.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

from ..formats.form import BLOCK_BYTES
from ..store.reading import WAIT_S, Ticket
from ..store.store import ExpertStore
from .guests import Guest
from .kept_rows import KeptRows
from .planning import WindowPlan, kept_rows
from .ring import Ring, RingMemory


@dataclass
class WindowCounters:
    """Counts since loading or `reset`.

    `entered` guests were computed. `waited` counts waits for guests and for rows, of `stall_s` seconds in all;
    `restarts` say how often what was read ahead was not what came. `rows` of tables were looked up, `rows_read` were
    read, and `rows_ahead` of these reads began before a layer needed the row. `bytes_read` are bytes of all reads that
    began, rows included.
    """

    entered: int = 0
    waited: int = 0
    restarts: int = 0
    rows: int = 0
    rows_read: int = 0
    rows_ahead: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0


@dataclass(eq=False)
class _Held:
    number: int
    ticket: Ticket
    views: dict[str, torch.Tensor] = field(default_factory=dict)


class Streamed:
    """What windows of all kinds share: rows of embeddings, waiting, counts.

    Args:
        store: reads guests: `plan.streamed` stand in its forms from number `first` on, then `plan.tables`.
        plan: what is streamed.
        first: number of the first guest in the store.
    """

    def __init__(self, store: ExpertStore, plan: WindowPlan, first: int) -> None:
        self.plan, self.counters = plan, WindowCounters()
        self._store, self._first = store, first
        numbers = range(first + len(plan.streamed), first + len(plan.streamed) + len(plan.tables))
        self._kept = [
            KeptRows(store, number, kept_rows(table)) for number, table in zip(numbers, plan.tables, strict=True)
        ]
        self.turn = 0
        """Changes whenever memory of guests that were entered may be given to others."""

    def enter(self, number: int) -> dict[str, torch.Tensor]:
        """A guest's weights, which stay until it is left; waits until they are there.

        Args:
            number: place in `plan.streamed`.

        Raises:
            OSError: if reading fails.
        """
        raise NotImplementedError

    def leave(self, turn: int) -> None:
        """The guest that was entered last is computed.

        Args:
            turn: what it was when the guest was entered.

        Raises:
            RuntimeError: if another call has taken its memory meanwhile, so that what was computed is worthless.
        """
        if turn != self.turn:
            raise RuntimeError(
                "a streamed model was called within a layer of another of its calls, whose weights are gone; "
                "call it between two passes"
            )

    def clear(self) -> None:
        """Forget every guest and every row; nothing may be on its way."""
        for kept in self._kept:
            kept.clear()

    def close(self) -> None:
        """Forget every guest and give the memory back; nothing may be on its way."""
        self.clear()
        for kept in self._kept:
            kept.close()

    def begin(self) -> None:
        """Start to read what a pass from the first guest on needs."""
        raise NotImplementedError

    def expect_rows(self, table: int, row_N: Sequence[int]) -> None:
        """Start to read rows that this pass will look up, as many as are kept.

        Args:
            table: place in `plan.tables`.
            row_N: numbers of different rows.
        """
        self.counters.rows_ahead += self._ask(table, row_N[: self._kept[table].count], is_demand=False)

    def rows(self, table: int, row_N: Sequence[int]) -> torch.Tensor:
        """Rows of a table, `[N, D]`; waits for those that are not in memory.

        Args:
            table: place in `plan.tables`.
            row_N: numbers of different rows.

        Raises:
            OSError: if reading fails.
        """
        guest, kept = self.plan.tables[table], self._kept[table]
        (parameter,) = guest.form.parameters
        out_ND = torch.empty(len(row_N), *parameter.shape, dtype=parameter.dtype)
        for start in range(0, len(row_N), kept.count):
            some = row_N[start : start + kept.count]
            self._ask(table, some, is_demand=True)
            out_ND[start : start + len(some)] = kept.take(some, partial(self._wait, guest=guest))
        self.counters.rows += len(row_N)
        return out_ND

    def _ask(self, table: int, row_N: Sequence[int], *, is_demand: bool) -> int:
        count = self._kept[table].ask(row_N, is_demand=is_demand)
        self.counters.rows_read += count
        self.counters.bytes_read += count * self.plan.tables[table].form.expert_bytes
        return count

    def report(self) -> dict[str, Any]:
        """Knobs and counts, JSON-serialisable."""
        return {
            "resident_layers": self.plan.num_resident,
            "streamed_layers": len(self.plan.streamed),
            "layers_ahead": self.plan.ahead,
            "pass_bytes": self.plan.pass_bytes,
            "memory_bytes": self.plan.nbytes,
            **vars(self.counters),
        }

    def reset(self) -> None:
        """Set all counts to 0."""
        self.counters = WindowCounters()

    def _wait(self, ticket: Ticket, guest: Guest) -> None:
        if not ticket.is_finished:
            self._store.promote(ticket)
            started = time.perf_counter()
            try:
                ticket.wait()
            except TimeoutError as error:
                raise TimeoutError(f"{guest.name} was not read within {WAIT_S:.0f} s; is its disk gone?") from error
            self.counters.stall_s += time.perf_counter() - started
            self.counters.waited += 1
        if ticket.error is not None:
            raise OSError(f"reading {guest.name} failed: {ticket.error}") from ticket.error
        if not ticket.is_complete:
            raise RuntimeError(f"{guest.name} was given up while it was read; call the model again")


class Window(Streamed):
    """A window of a model's own. One thread at a time calls it; the runtime holds a lock.

    Args:
        store: reads guests: `plan.streamed` stand in its forms from number `first` on, then `plan.tables`.
        plan: what is streamed.
        first: number of the first guest in the store.
    """

    def __init__(self, store: ExpertStore, plan: WindowPlan, first: int) -> None:
        super().__init__(store, plan, first)
        num_blocks = plan.ring_bytes // BLOCK_BYTES
        self._ring, self._memory = Ring(num_blocks), RingMemory(num_blocks) if num_blocks else None
        self.clear()

    def clear(self) -> None:
        super().clear()
        self._forget()

    def _forget(self) -> None:
        """Forget every guest, none of which may be on its way."""
        self._held: deque[_Held] = deque()
        self._ring.clear()
        self.turn += 1

    def close(self) -> None:
        super().close()
        if self._memory is not None:
            self._memory.give_back()

    def enter(self, number: int) -> dict[str, torch.Tensor]:
        """A guest's weights, which stay until it is left; waits until they are there.

        Args:
            number: place in `plan.streamed`.

        Raises:
            OSError: if reading fails.
        """
        self._go_to(number)
        self._read_on(number)
        held = self._held[0]
        self.counters.entered += 1
        self._wait(held.ticket, self.plan.streamed[number])
        return held.views

    def begin(self) -> None:
        """Start to read the first guests, if the last pass has not."""
        if self.plan.streamed:
            self._go_to(0)
            self._read_on(0)

    def leave(self, turn: int) -> None:
        """Give the guest's memory to the next ones."""
        super().leave(turn)
        number = self._held.popleft().number
        self._ring.give_back()
        self._read_on(number)

    def _go_to(self, number: int) -> None:
        """Make this guest the first one that is held or on its way."""
        if self._held and self._held[0].number != number:
            self.counters.restarts += 1
            self._drop()
        if not self._held:
            self._read(number)

    def _drop(self) -> None:
        """Give up everything, and wait for reads that write to the memory."""
        for held in self._held:
            held.ticket.is_cancelled = True
        for held in self._held:
            held.ticket.wait()
        self._forget()

    def _read_on(self, last: int) -> None:
        """Start as many reads as may be on their way and as there is memory for, of what comes after all others.

        Args:
            last: the guest before those that are held, should none be.
        """
        count = len(self.plan.streamed)
        while len(self._held) <= min(self.plan.ahead, count - 1):
            last = self._held[-1].number if self._held else last
            if not self._read((last + 1) % count):
                return

    def _read(self, number: int) -> bool:
        """Start to read a guest; whether there is memory for it."""
        form = self.plan.streamed[number].form
        if (start := self._ring.take(form.slot_bytes // BLOCK_BYTES)) is None:
            return False
        assert self._memory is not None
        # Behind what experts need now. `enter` moves it to the front.
        layer, landed = self._first + number, SimpleQueue[Ticket]()
        ticket, shifts = self._store.read(layer, 0, start, self._memory, landed, is_demand=False)
        self._held.append(_Held(number, ticket, form.views(self._memory.slot(start), shifts)))
        self.counters.bytes_read += form.expert_bytes
        return True
