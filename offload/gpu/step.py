"""One call of one layer with a GPU tier.

What is on the GPU is launched before the host knows which experts are needed. Then all that is missing starts to come
at once: copies of what RAM has, reads of what it has not; each expert is computed as it arrives, and the weighted sum
runs once, in a fixed order.

Shapes: T tokens, K experts per token, N = T * K routed rows, n some of them, E experts, D model width.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from ..compute.matvec import Matvecs
from ..ram.counters import Counters
from ..ram.slots import LayerSlots
from .counters import GpuCounters
from .lanes import Copy, Lane
from .ram_feed import RamFeed
from .rows import KernelExperts, KernelRows, LoopExperts, LoopRows, one_expert
from .slots import LayerGpuSlots, Ring, SlotMap
from .split import Splitter

PREFILL_TOKENS = 16
"""Calls of more tokens let experts that find no free slot pass through, so that decoding finds its own ones again."""
LEARN_FROM_TOKENS = 512

LookAhead = Callable[[torch.Tensor], None]


class CpuShare:
    """What the CPU computes of a layer's misses.

    Args:
        module: the experts module, on the CPU.
        splitter: decides which misses, shared by all layers.
        matvecs: products for single rows.
    """

    def __init__(self, module: Any, splitter: Splitter, matvecs: Matvecs) -> None:
        self._module, self.splitter, self._matvecs = module, splitter, matvecs

    def compute(self, x_nD: torch.Tensor, weights: Mapping[str, torch.Tensor], expert: int) -> torch.Tensor:
        return one_expert(self._module, x_nD, weights, expert, self._multiply)

    def _multiply(self, x_nD: torch.Tensor, weight_DF: torch.Tensor) -> torch.Tensor:
        if len(x_nD) == 1:
            out_1F = x_nD.new_empty(1, weight_DF.shape[1])
            if self._matvecs.multiply(x_nD, (weight_DF.t(),), (out_1F,)):
                return out_1F
        return torch.mm(x_nD, weight_DF)


class GpuLayer:
    """One layer: its slots on the GPU and in RAM, and how it is computed.

    Args:
        lane: the device.
        slots: GPU slots.
        ring: GPU slots to pass through.
        ram: RAM slots.
        experts: how experts are computed on the GPU.
        cpu: what is computed on the CPU, or None for nothing.
    """

    def __init__(
        self,
        lane: Lane,
        slots: LayerGpuSlots,
        ring: Ring,
        ram: LayerSlots,
        experts: KernelExperts | LoopExperts,
        cpu: CpuShare | None,
    ) -> None:
        self.lane, self.slots, self.ring, self.ram, self.experts, self.cpu = lane, slots, ring, ram, experts, cpu
        self.lent: dict[int, Copy] = {}


class GpuStep:
    """One call."""

    def __init__(self, layer: GpuLayer, counters: Counters, gpu_counters: GpuCounters) -> None:
        self._layer, self._counters, self._gpu_counters = layer, counters, gpu_counters
        self._lane, self._slots, self._ring = layer.lane, layer.slots, layer.ring
        self._wave: dict[int, int] = {}
        self._last_copy: Copy | None = None

    def run(
        self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor, look_ahead: LookAhead
    ) -> torch.Tensor:
        """The weighted sum of each token's experts, `[T, D]`.

        Args:
            look_ahead: called with the ids on the host, once everything that is missing is on its way.

        Raises:
            OSError: if reading an expert failed.
        """
        lane, hits = self._lane, self._slots.map
        ids_TK = lane.host(tuple(expert_TK.shape), expert_TK.dtype)
        has_cpu_share = self._layer.cpu is not None and len(x_TD) <= PREFILL_TOKENS
        x_host_TD = lane.host(tuple(x_TD.shape), x_TD.dtype) if has_cpu_share else None
        lane.launch(lambda: _download(((ids_TK, expert_TK), (x_host_TD, x_TD))))
        known = lane.mark()
        rows = self._layer.experts.rows(x_TD, expert_TK, self._slots)
        is_early = not self._layer.experts.needs_ids
        if is_early and hits.slot_of:
            lane.launch(lambda: rows.compute(self._slots, hits))
        started = time.perf_counter()
        known.wait()
        self._gpu_counters.ids_wait_s += time.perf_counter() - started
        num_rows = self._count(ids_TK, rows)
        feed = self._look_up(ids_TK, num_rows)
        if not is_early and hits.slot_of:
            lane.launch(lambda: rows.compute(self._slots, hits))
        self._bring(rows, feed, num_rows, ids_TK, x_host_TD, look_ahead)
        combined = lane.hand_over(lambda: rows.combine(weight_TK))
        self._slots.publish()
        self._gpu_counters.harvest_many()
        return combined

    def _count(self, ids_TK: torch.Tensor, rows: KernelRows | LoopRows) -> dict[int, int]:
        """Rows of each expert that has any."""
        expert_ids, counts = np.unique(ids_TK.numpy(), return_counts=True)
        found = dict(zip(expert_ids.tolist(), counts.tolist(), strict=True))
        num_rows = {expert: count for expert, count in found.items() if 0 <= expert < self._layer.ram.num_experts}
        rows.expect(num_rows, sum(count for expert, count in found.items() if expert < 0))
        return num_rows

    def _look_up(self, ids_TK: torch.Tensor, num_rows: Mapping[int, int]) -> RamFeed:
        ram = self._layer.ram
        for experts in ids_TK[-LEARN_FROM_TOKENS:].tolist():
            ram.cache.demand([expert for expert in dict.fromkeys(experts) if expert in num_rows])
        misses = [expert for expert in num_rows if expert not in self._slots]
        feed = RamFeed(ram, misses, self._slots, self._layer.lent, self._counters)
        self._gpu_counters.hits += len(num_rows) - len(misses)
        self._gpu_counters.misses += len(misses)
        self._counters.layers[ram.layer].hits += len(num_rows) - len(misses) + len(feed.present)
        return feed

    def _bring(
        self,
        rows: KernelRows | LoopRows,
        feed: RamFeed,
        num_rows: Mapping[int, int],
        ids_TK: torch.Tensor,
        x_host_TD: torch.Tensor | None,
        look_ahead: LookAhead,
    ) -> None:
        """Get every miss computed: those in RAM first, then the others as they land."""
        feed.start_reads()
        staying = self._staying(num_rows, len(ids_TK))
        on_cpu = self._choose_for_cpu(feed, num_rows) if x_host_TD is not None else []
        for expert in [expert for expert in feed.present if expert not in on_cpu]:
            self._send(rows, feed, expert, num_rows, is_staying=expert in staying)
        feed.start_reads()
        look_ahead(ids_TK)
        for expert in on_cpu:
            assert x_host_TD is not None
            self._compute_here(rows, feed, expert, ids_TK, x_host_TD)
        while (landed := feed.next_landed()) is not None:
            self._send(rows, feed, landed, num_rows, is_staying=landed in staying)
        self._compute_wave(rows)

    def _staying(self, num_rows: Mapping[int, int], num_tokens: int) -> set[int]:
        """Which misses get a slot of the layer; in prefill they take free ones only and leave the others in peace."""
        slots = self._slots
        missing = [expert for expert in num_rows if expert not in slots]
        is_prefill = num_tokens > PREFILL_TOKENS
        room = slots.num_free if is_prefill else slots.num_slots - (len(num_rows) - len(missing))
        return set(sorted(missing, key=self._layer.ram.cache.rank, reverse=True)[:room])

    def _send(
        self, rows: KernelRows | LoopRows, feed: RamFeed, expert: int, num_rows: Mapping[int, int], *, is_staying: bool
    ) -> None:
        """Copy one expert to the GPU and compute it there once it has come."""
        if not is_staying:
            self._send_through(rows, feed, expert)
            return
        slots, where = self._slots, {expert: self._slots.take(expert, num_rows)}
        copy = self._copy(feed, expert, slots.pairs(where[expert], feed[expert]), slots.released)
        self._lane.compute_after(copy)
        self._set_biases(slots, where)
        moment = SlotMap(where, self._layer.ram.num_experts, self._lane)
        self._lane.launch(lambda: rows.compute(slots, moment))

    def _send_through(self, rows: KernelRows | LoopRows, feed: RamFeed, expert: int) -> None:
        slot, after = self._ring.take()
        self._last_copy = self._copy(feed, expert, self._ring.pairs(slot, feed[expert]), after)
        self._wave[expert] = slot
        if len(self._wave) == self._ring.wave:
            self._compute_wave(rows)

    def _compute_wave(self, rows: KernelRows | LoopRows) -> None:
        """Everything that has come into the ring since the last wave, as soon as the last copy is there."""
        if not self._wave or self._last_copy is None:
            return
        where, self._wave = self._wave, {}
        self._lane.compute_after(self._last_copy)
        self._set_biases(self._ring, where)
        moment = SlotMap(where, self._layer.ram.num_experts, self._lane)
        self._lane.launch(lambda: rows.compute(self._ring, moment))
        self._ring.mark_read(where.values())

    def _set_biases(self, slots: LayerGpuSlots | Ring, where: Mapping[int, int]) -> None:
        biases = self._layer.experts.biases
        if biases:
            self._lane.launch(lambda: [slots.set_biases(slot, biases, expert) for expert, slot in where.items()])

    def _copy(self, feed: RamFeed, expert: int, pairs: list[tuple[torch.Tensor, torch.Tensor]], after: Any) -> Copy:
        copy = self._lane.copy_in(pairs, after)
        feed.lend(expert, copy)
        self._gpu_counters.copies.append(copy)
        return copy

    def _choose_for_cpu(self, feed: RamFeed, num_rows: Mapping[int, int]) -> list[int]:
        assert self._layer.cpu is not None
        self._gpu_counters.harvest(self._layer.cpu.splitter.wire)
        counts = [num_rows[expert] for expert in feed.present]
        places = self._layer.cpu.splitter.choose(self._layer.ram.expert_bytes, counts)
        return [feed.present[place] for place in places]

    def _compute_here(
        self, rows: KernelRows | LoopRows, feed: RamFeed, expert: int, ids_TK: torch.Tensor, x_host_TD: torch.Tensor
    ) -> None:
        """One expert on the CPU: activations are here already, outputs go up."""
        cpu, lane = self._layer.cpu, self._lane
        assert cpu is not None
        row_n = (ids_TK.reshape(-1) == expert).nonzero()[:, 0]
        started = time.perf_counter()
        y_nD = cpu.compute(x_host_TD[row_n // ids_TK.shape[1]], feed[expert], expert)
        seconds = time.perf_counter() - started
        feed.give_back(expert)
        cpu.splitter.note_cpu(self._layer.ram.expert_bytes, len(row_n), seconds)
        self._gpu_counters.cpu_experts += 1
        self._gpu_counters.cpu_s += seconds
        sent = lane.host(tuple(y_nD.shape), y_nD.dtype).copy_(y_nD)
        places = lane.host(tuple(row_n.shape), row_n.dtype).copy_(row_n)

        def put() -> None:
            rows.put(*(tensor.to(lane.device, non_blocking=True) for tensor in (places, sent)))

        lane.launch(put)


def _download(pairs: tuple[tuple[torch.Tensor | None, torch.Tensor], ...]) -> None:
    for target, source in pairs:
        if target is not None:
            target.copy_(source, non_blocking=True)
