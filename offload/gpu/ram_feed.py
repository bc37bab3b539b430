"""The RAM tier below a GPU: gives the experts that a step misses, those in memory first, the others as they land.

A RAM slot that a copy to the GPU still reads is lent: nothing may be read into it. Where room is short, experts that
are on the GPU as well go first, those that will stay there longest before the others. Nothing is copied back from the
GPU: an expert that it gives up is in RAM only if its slot there was not needed meanwhile.
"""

import time
from collections.abc import Collection, Container, Mapping
from queue import SimpleQueue

import torch

from ..ram.counters import Counters
from ..ram.slots import LayerSlots
from ..store.reading import Ticket, next_landed
from .lanes import Copy


class RamFeed:
    """The misses of one call of one layer.

    Args:
        ram: the layer's RAM slots.
        misses: experts that are needed and not on the GPU.
        on_gpu: experts in GPU slots; their RAM slots are given up first.
        lent: expert -> copy that reads its RAM slot; outlives the call.
        counters: receives reads and stalls.
    """

    def __init__(
        self,
        ram: LayerSlots,
        misses: Collection[int],
        on_gpu: Container[int],
        lent: dict[int, Copy],
        counters: Counters,
    ) -> None:
        self._ram, self._on_gpu, self._lent, self._counters = ram, on_gpu, lent, counters
        self._landed: SimpleQueue[Ticket] = SimpleQueue()
        self._in_flight = ram.settle_ahead(misses, self._landed)
        self.present = [expert for expert in misses if expert in ram and expert not in self._in_flight]
        self._waiting = sorted((expert for expert in misses if expert not in ram), key=ram.cache.rank)
        layer = counters.layers[ram.layer]
        layer.misses += len(self._waiting) + len(self._in_flight)
        layer.bytes_read += len(self._waiting) * ram.expert_bytes

    def __getitem__(self, expert: int) -> Mapping[str, torch.Tensor]:
        return self._ram[expert]

    def start_reads(self) -> None:
        """Start as many reads as there is room for."""
        while self._waiting and self._make_room():
            self._read_next()

    def next_landed(self) -> int | None:
        """The next expert that was read, or None when all are read."""
        self.start_reads()
        while self._waiting and not self._in_flight:
            self._wait_for_room()
            self.start_reads()
        if not self._in_flight:
            return None
        started = time.perf_counter()
        ticket = next_landed(
            self._landed, f"one of the experts {sorted(self._in_flight)[:8]} of MoE layer {self._ram.layer}"
        )
        self._counters.stall_s += time.perf_counter() - started
        del self._in_flight[ticket.expert]
        self.present.append(ticket.expert)
        return ticket.expert

    def lend(self, expert: int, copy: Copy) -> None:
        """A copy reads this expert's slot until it is done."""
        self._lent[expert] = copy
        self.give_back(expert)

    def give_back(self, expert: int) -> None:
        """This expert is not needed from RAM any more."""
        self.present.remove(expert)

    def _read_next(self) -> None:
        expert = self._waiting.pop()
        # everything is pinned: the RAM tier does not know which slots are lent, so it must not evict by itself
        self._ram.start_read(expert, list(self._ram.cache.resident), self._landed)
        self._in_flight[expert] = 1

    def _make_room(self) -> bool:
        """Whether a slot is free, or could be made free."""
        if self._ram.num_free:
            return True
        for expert in [expert for expert, copy in self._lent.items() if copy.is_done]:
            del self._lent[expert]
        busy = {*self.present, *self._in_flight, *self._lent}
        others = [expert for expert in self._ram.cache.resident if expert not in busy]
        if not others:
            return False
        twice = [expert for expert in others if expert in self._on_gpu]
        rank = self._ram.cache.rank
        # safe: needed by no later copy of this call (present), written by no read (in flight), read by no copy (lent)
        self._ram.release(max(twice, key=rank) if twice else min(others, key=rank))
        return True

    def _wait_for_room(self) -> None:
        """Nothing is being read for this call: every slot is lent, or still holds a read that was given up."""
        if self._lent:
            # any copy that ends frees a slot; the first of the dict is, but for experts lent twice, the oldest
            next(iter(self._lent.values())).wait()
        else:
            # taking the slot waits for the read that was given up
            self._read_next()
