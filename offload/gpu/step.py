"""One call of one layer with a GPU tier.

Experts on the GPU are launched before the host knows which ones are needed. Then everything missing starts to come
at once: copies of what RAM has, reads of what it lacks. Each expert is computed as it arrives, and the weighted sum
runs once, in a fixed order.

Who waits for whom:

- The host waits in two places: for the ids of the experts, and for reads (`RamFeed.next_landed`).
- A copy into a slot waits until earlier calls no longer read that slot (`slots.released`, or the ring's own mark).
- The compute stream waits for a copy before it reads the slot.
- A read into a RAM slot waits until no copy to the GPU reads it any more (`lent`, see ram_feed.py).

Shapes: T tokens, K experts per token, N = T * K routed rows, n some of them, E experts, D model width.
"""

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from ..ram.counters import Counters
from .counters import GpuCounters
from .lanes import Copy, Mark, Pairs
from .layer import CpuShare, GpuLayer
from .ram_feed import RamFeed
from .slots import LayerGpuSlots, Ring, SlotMap

PREFILL_TOKENS = 16
"""Calls of more tokens let experts that find no free slot pass through, so that decoding finds its own ones again. At
16 random tokens with K = 8, 86 % of 64 experts are asked for. Other values were not tried."""
LEARN_FROM_TOKENS = 512
"""Tokens of a prefill that the cache policy sees, from the end, as on the CPU: decoding goes on from these."""

LookAhead = Callable[[torch.Tensor], None]


class GpuStep:
    """One call; its attributes are the state of the call.

    It begins at once: when it is made, the ids are on their way to the host.

    Args:
        layer: the layer that is asked.
        counters: receive hits, misses and stalls of the RAM tier.
        gpu_counters: receive hits, copies and the CPU's share.
        x_TD: hidden states, on the device.
        expert_TK: experts of each token, on the device; ids outside 0..E-1 have no output.
    """

    def __init__(
        self,
        layer: GpuLayer,
        counters: Counters,
        gpu_counters: GpuCounters,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
    ) -> None:
        self._layer, self._counters, self._gpu_counters = layer, counters, gpu_counters
        self._lane, self._slots, self._ring, self._ram = layer.lane, layer.slots, layer.ring, layer.ram
        self._is_prefill = len(x_TD) > PREFILL_TOKENS
        self._cpu = None if self._is_prefill else layer.cpu
        self._ids_TK = self._lane.host(tuple(expert_TK.shape), expert_TK.dtype)
        self._x_host_TD = self._lane.host(tuple(x_TD.shape), x_TD.dtype) if self._cpu else torch.empty(0)
        # the host waits for these, so they are queued before anything else of this call
        wanted = [(self._ids_TK, expert_TK), *([(self._x_host_TD, x_TD)] if self._cpu else [])]
        self._lane.launch(lambda: _download(wanted))
        self._known = self._lane.mark()
        self._rows = layer.experts.rows(x_TD, expert_TK, self._slots)
        self._num_rows: dict[int, int] = {}
        """Rows of each expert that has any; empty until the ids have come."""
        self._feed: RamFeed
        """The misses; there is none until the ids have come."""
        self._at_peer: list[int] = []
        """Misses that lie in another GPU's memory."""
        self._wave: dict[int, int] = {}
        """Expert -> ring slot, for what was copied into the ring and is not launched yet."""
        self._last_copy: Copy | None = None

    def run(self, weight_TK: torch.Tensor, look_ahead: LookAhead) -> torch.Tensor:
        """The weighted sum of each token's experts, `[T, D]`.

        Args:
            weight_TK: combine weights, on the device.
            look_ahead: called with the ids on the host, once everything that is missing is on its way.

        Raises:
            OSError: if reading an expert failed.
        """
        # one snapshot for both: an expert that comes later in this call is computed when it comes, not twice
        hits = self._slots.map
        is_early = not self._layer.experts.needs_ids
        if is_early and hits.slot_of:
            self._compute(self._slots, hits)
        arrivals = self._slots.arrivals()
        self._wait_for_ids()
        self._feed = self._look_up()
        if not is_early and hits.slot_of:
            self._compute(self._slots, hits)
        self._compute_arrivals(arrivals)
        self._bring(look_ahead)
        combined = self._lane.hand_over(lambda: self._rows.combine(weight_TK))
        self._slots.publish()
        self._gpu_counters.harvest_many()
        return combined

    def _compute_arrivals(self, arrivals: Mapping[int, tuple[int, Copy]]) -> None:
        """What was copied before the layer was asked, expert by expert in the order of the copies.

        All are waited for, also those that have no rows: from now on they are hits like any other.
        """
        for expert, (slot, copy) in arrivals.items():
            self._lane.compute_after(copy)
            self._compute_in(self._slots, {expert: slot})

    def _wait_for_ids(self) -> None:
        started = time.perf_counter()
        self._known.wait()
        self._gpu_counters.ids_wait_s += time.perf_counter() - started
        expert_ids, counts = np.unique(self._ids_TK.numpy(), return_counts=True)
        found = dict(zip(expert_ids.tolist(), counts.tolist(), strict=True))
        self._num_rows.update((expert, count) for expert, count in found.items() if 0 <= expert < self._ram.num_experts)
        self._rows.expect(self._num_rows, sum(count for expert, count in found.items() if expert < 0))

    def _look_up(self) -> RamFeed:
        ram, num_rows = self._ram, self._num_rows
        for experts in self._ids_TK[-LEARN_FROM_TOKENS:].tolist():
            ram.cache.demand([expert for expert in dict.fromkeys(experts) if expert in num_rows])
        misses = [expert for expert in num_rows if expert not in self._slots]
        if (peer := self._layer.peer) is not None:
            self._at_peer = [expert for expert in misses if expert in peer]
        below = [expert for expert in misses if expert not in self._at_peer]
        feed = RamFeed(ram, below, self._slots, self._layer.lent, self._counters)
        self._gpu_counters.hits += len(num_rows) - len(misses)
        self._gpu_counters.misses += len(misses)
        self._gpu_counters.peer_hits += len(self._at_peer)
        self._counters.layers[ram.layer].hits += len(num_rows) - len(below) + len(feed.present)
        return feed

    def _bring(self, look_ahead: LookAhead) -> None:
        """Get every miss computed: those in RAM first, then the others as they land."""
        feed = self._feed
        # before the copies: the disk is the slowest, and works while the host queues them
        feed.start_reads()
        staying = self._staying()
        if (peer := self._layer.peer) is not None:
            with peer.holding(frozenset(self._at_peer)):
                for expert in self._at_peer:
                    self._send(expert, is_staying=expert in staying)
        on_cpu = [] if self._cpu is None else self._choose_for(self._cpu)
        for expert in [expert for expert in feed.present if expert not in on_cpu]:
            self._send(expert, is_staying=expert in staying)
        # again: copies that are over have freed slots
        feed.start_reads()
        look_ahead(self._ids_TK)
        for expert in on_cpu:
            assert self._cpu is not None
            self._compute_on(self._cpu, expert)
        while (landed := feed.next_landed()) is not None:
            self._send(landed, is_staying=landed in staying)
        self._compute_wave()

    def _staying(self) -> set[int]:
        """Which misses get a slot of the layer; in prefill they take free ones only and leave the others in peace."""
        slots = self._slots
        missing = [expert for expert in self._num_rows if expert not in slots]
        # hits of this call keep their slots: copies wait for earlier calls (`released`), not for this one's kernels
        room = slots.num_free if self._is_prefill else slots.room_beside(self._num_rows)
        return set(sorted(missing, key=slots.worth, reverse=True)[:room])

    def _send(self, expert: int, *, is_staying: bool) -> None:
        """Copy one expert to the GPU and compute it there once it has come."""
        if not is_staying:
            self._send_through(expert)
            return
        slot = self._slots.take(expert, self._num_rows)
        copy = self._copy(expert, self._slots.pairs(slot, self._source(expert)), self._slots.released)
        self._lane.compute_after(copy)
        self._compute_in(self._slots, {expert: slot})

    def _send_through(self, expert: int) -> None:
        slot, after = self._ring.take()
        self._last_copy = self._copy(expert, self._ring.pairs(slot, self._source(expert)), after)
        self._wave[expert] = slot
        if len(self._wave) == self._ring.wave:
            self._compute_wave()

    def _compute_wave(self) -> None:
        """Everything that has come into the ring since the last wave, as soon as the last copy is there."""
        if not self._wave or self._last_copy is None:
            return
        where, self._wave = self._wave, {}
        # copies are in order on one stream: after the last one, the others are complete too
        self._lane.compute_after(self._last_copy)
        self._compute_in(self._ring, where)
        self._ring.mark_read(where.values())

    def _compute_in(self, slots: LayerGpuSlots | Ring, where: Mapping[int, int]) -> None:
        """Launch the rows of experts that have just come; their biases, which are on the device, follow them."""
        biases = self._layer.experts.biases
        if biases:
            self._lane.launch(lambda: [slots.set_biases(slot, biases, expert) for expert, slot in where.items()])
        self._compute(slots, SlotMap(where, self._ram.num_experts, self._lane))

    def _compute(self, slots: LayerGpuSlots | Ring, where: SlotMap) -> None:
        self._lane.launch(lambda: self._rows.compute(slots, where))

    def _copy(self, expert: int, pairs: Pairs, after: Mark | None) -> Copy:
        copy = self._lane.copy_in(pairs, after)
        if expert not in self._at_peer:
            self._feed.lend(expert, copy)
        self._gpu_counters.copies.append(copy)
        return copy

    def _source(self, expert: int) -> Mapping[str, torch.Tensor]:
        """Where an expert that is not on the GPU lies: in another GPU's memory, or in RAM."""
        peer = self._layer.peer
        return peer.weights(expert) if peer is not None and expert in self._at_peer else self._feed[expert]

    def _choose_for(self, cpu: CpuShare) -> list[int]:
        self._gpu_counters.harvest(cpu.splitter.wire)
        present = self._feed.present
        places = cpu.splitter.choose(self._ram.expert_bytes, [self._num_rows[expert] for expert in present])
        return [present[place] for place in places]

    def _compute_on(self, cpu: CpuShare, expert: int) -> None:
        """Compute one expert on the CPU, from the host's copy of the activations; its outputs go to the device."""
        lane = self._lane
        row_n = (self._ids_TK.reshape(-1) == expert).nonzero()[:, 0]
        started = time.perf_counter()
        y_nD = cpu.compute(self._x_host_TD[row_n // self._ids_TK.shape[1]], self._feed[expert], expert)
        seconds = time.perf_counter() - started
        self._feed.give_back(expert)
        cpu.splitter.note_cpu(self._ram.expert_bytes, len(row_n), seconds)
        self._gpu_counters.cpu_experts += 1
        self._gpu_counters.cpu_s += seconds
        # pinned copies: from pageable memory, the host would wait for the transfer
        sent = lane.host(tuple(y_nD.shape), y_nD.dtype).copy_(y_nD)
        places = lane.host(tuple(row_n.shape), row_n.dtype).copy_(row_n)
        lane.launch(lambda: self._rows.put(*(tensor.to(lane.device, non_blocking=True) for tensor in (places, sent))))


def _download(pairs: Pairs) -> None:
    for target, source in pairs:
        target.copy_(source, non_blocking=True)
