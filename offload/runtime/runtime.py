"""The running model's side: what happens when transformers calls an experts module.

One call of one layer looks all experts up and starts to read all that are missing. It computes the experts in slots,
then the others in the order in which they arrive, and combines them in a fixed order. Slots that a call uses are not
evicted during that call.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..compute.adapters import adapted_of
from ..compute.fused_experts import FusedExperts, FusedRows, fuse_experts
from ..compute.layers.ending import Ending
from ..compute.layers.routed_block import PLACE
from ..compute.layers.routed_experts import WEIGHT_TYPES, TokenExperts, combines_like_torch
from ..compute.layers.trial import Quickened
from ..compute.matvec import Matvecs
from ..compute.routed_rows import RoutedRows, eager_forward
from ..gpu.tier import GpuTier
from ..neurons.binding import BundledUnits
from ..prefetch.prefetch import Prefetcher
from ..ram.counters import Counters, LayerCounters
from ..ram.expanded import ExpandedWeights, make_rooms
from ..ram.level_slots import LevelRoom, LevelSlots
from ..ram.slots import KernelSlots, LayerSlots
from ..ram.step import ExpertStep, TokenStep, compute_hits
from ..store.store import ExpertStore
from ..window.window import Streamed
from .guarded.ahead import ReadingAhead
from .guarded.changes import Changes
from .guarded.lent_guests import LentGuests
from .guards import expect_no_gradient, expect_numbers_in_memory
from .recorder import TraceRecorder

IMPLEMENTATION = "expertier_offload"
ROWS_FOR_ALL = 4
"""At 4 random rows per expert about 2 % of the experts (e^-4) get none; from here on, prefill reads the next layer
whole."""


class OffloadRuntime:
    """All layers of one offloaded model.

    Args:
        store: reads experts from the SSD; closed with the runtime.
        layers: RAM slots of each.
        recorder: records the routing of every call; None records nothing.
        matvecs: products for experts with a few rows.
    """

    def __init__(
        self,
        store: ExpertStore,
        layers: Sequence[LayerSlots],
        recorder: TraceRecorder | None,
        matvecs: Matvecs,
    ) -> None:
        self.matvecs = matvecs
        self.store = store
        self.layers = list(layers)
        self.counters = Counters([LayerCounters() for _ in self.layers])
        self.recorder = recorder
        self.prefetcher: Prefetcher | None = None
        self._rooms = make_rooms(store.forms)
        self._fused: dict[tuple[int, int, int], FusedExperts | None] = {}
        self._token_steps: dict[tuple[int, int, int, torch.dtype], TokenStep | None] = {}
        self.gpu: GpuTier | None = None
        self.window: Streamed | None = None
        self.guests: LentGuests | None = None
        """What modules ask for their streamed weights."""
        self.units: BundledUnits | None = None
        self.quickened = Quickened(0, 0)
        """What our C computes for one token, besides experts."""
        self.changes = Changes(self._clear)
        self.ahead = ReadingAhead(self.layers, self.changes)

    def __deepcopy__(self, memo: dict[int, Any]) -> "OffloadRuntime":
        """A copied model shares its experts, which are only read."""
        return self

    def __reduce__(self) -> Any:
        raise TypeError("an offloaded model cannot be pickled; load it with offload.load in the other process")

    def forward(
        self, layer: int, module: Any, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        """The experts' output for one layer, `[T, D]`."""
        self.changes.enter_process()
        with self.changes.lock:
            self.changes.begin()
            if torch.is_grad_enabled():
                with torch.no_grad():
                    result = self._forward(layer, module, x_TD, expert_TK, weight_TK)
            else:
                result = self._forward(layer, module, x_TD, expert_TK, weight_TK)
            # a signal handler may have closed the model within this call, and its slots hold zeros since
            self.store.expect_open()
            # not in a `finally`: after an exception they have to stay unfinished
            self.changes.finish()
            return result

    def _forward(
        self, layer: int, module: Any, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        if self.recorder is not None:
            self.recorder.note(layer, expert_TK, weight_TK)
        if self.gpu is not None:
            look_ahead = partial(self._look_ahead, layer, x_TD)
            return self.gpu.forward(layer, x_TD, expert_TK, weight_TK, look_ahead)
        slots = self.layers[layer]
        expert_TK = slots.begin(x_TD, expert_TK, weight_TK)
        if len(x_TD) == 1 and (found := self._token(layer, module, x_TD, expert_TK, weight_TK)) is not None:
            return found
        result = self._computed(slots, module, x_TD, expert_TK, weight_TK)
        slots.end()
        return result

    def _computed(
        self, slots: LayerSlots, module: Any, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        layer = slots.layer
        if not slots.is_grouped and not adapted_of(module):
            return self._forward_eager(slots, module, x_TD, expert_TK, weight_TK)
        rows = self._rows(slots, module, x_TD, expert_TK, weight_TK)
        is_fused = isinstance(rows, FusedRows)
        if is_fused and self.prefetcher is None and compute_hits(slots, self.counters, rows, expert_TK):
            slots.deepen()
            return rows.combine()
        weights = KernelSlots(slots) if is_fused else self._plain_weights(slots)
        step = ExpertStep(slots, weights, self.counters, rows.num_rows, expert_TK)
        step.begin(rows)
        self._look_ahead(layer, x_TD, expert_TK)
        slots.deepen()
        step.finish(rows)
        return rows.combine()

    def _clear(self) -> None:
        """Forget all experts."""
        self.store.quiesce()
        for slots in self.layers:
            slots.clear()
        if self.gpu is not None:
            self.gpu.clear()
        if self.window is not None:
            self.window.clear()

    def visit(self, layer: int, expert_TK: torch.Tensor) -> Iterator[tuple[int, Mapping[str, torch.Tensor]]]:
        """The experts of some tokens again, one after the other, each with its weights until the next one is asked for.

        Args:
            layer: number of the MoE layer.
            expert_TK: ids; those outside 0..E-1 are left out.

        Raises:
            OSError: if reading fails.
        """
        with self.changes.within():
            slots = self.layers[layer]
            expert_ids, counts = expert_TK.unique(return_counts=True)
            found = zip(expert_ids.tolist(), counts.tolist(), strict=True)
            num_rows = {expert: count for expert, count in found if 0 <= expert < slots.num_experts}
            step = ExpertStep(slots, self._plain_weights(slots), self.counters, num_rows, expert_TK)
            step.prepare()
            for expert in num_rows:
                yield expert, step.fetch(expert)

    def resize(self, rooms: Sequence[LevelRoom]) -> None:
        """Give each layer other room, between two calls; experts in levels lose the coldest of what they had.

        Raises:
            OSError: if a read that is on its way fails.
        """
        with self.changes.within():
            for slots, room in zip(self.layers, rooms, strict=True):
                if isinstance(slots, LevelSlots):
                    slots.resize(room)

    def _rows(
        self, slots: LayerSlots, module: Any, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> RoutedRows | FusedRows:
        num_tokens, top_k = expert_TK.shape
        room = self._rooms[slots.layer]
        may_fuse = (num_tokens == 1 or room is not None or self.matvecs.is_row_alone) and not adapted_of(module)
        if may_fuse and x_TD.dtype == torch.bfloat16 and x_TD.is_contiguous():
            fused = self._fused_experts(slots.layer, module, top_k)
            if fused is not None:
                rows = FusedRows(fused, slots.num_experts, x_TD, expert_TK, weight_TK)
                if fused.can_compute(rows.num_rows.values(), room):
                    return rows
        return RoutedRows(module, slots.num_experts, x_TD, expert_TK, weight_TK, self.matvecs)

    def _plain_weights(self, slots: LayerSlots) -> LayerSlots | ExpandedWeights:
        room = self._rooms[slots.layer]
        return slots if room is None else ExpandedWeights(slots, slots.form, room)

    def _token(
        self, layer: int, module: Any, x_1D: torch.Tensor, expert_1K: torch.Tensor, weight_1K: torch.Tensor
    ) -> torch.Tensor | None:
        """One token whose experts are all in slots; None, and nothing is done, if they are not."""
        step = self.token_step(layer, module, expert_1K.shape[1], weight_1K.dtype)
        if step is None or self.prefetcher is not None or not step.experts.takes(x_1D, expert_1K, weight_1K):
            return None
        out_1D = torch.empty_like(x_1D)
        return out_1D if step(x_1D.data_ptr(), expert_1K, weight_1K.data_ptr(), None, None, out_1D.data_ptr()) else None

    @property
    def listens(self) -> bool:
        """Whether tokens are recorded, or experts guessed from them."""
        return self.recorder is not None or self.prefetcher is not None

    def token_step(self, layer: int, module: Any, top_k: int, weight_type: torch.dtype) -> TokenStep | None:
        """What computes single tokens of a layer; None if nothing does, or no expert of the layer was used yet.

        Args:
            layer: number of the MoE layer.
            module: its experts.
            top_k: K, experts of the token.
            weight_type: of the combine weights.
        """
        slots, threads = self.layers[layer], torch.get_num_threads()
        key = (layer, top_k, threads, weight_type)
        if key not in self._token_steps:
            if (example := slots.addresses.example) is None:
                return None
            fused = self._fused_experts(layer, module, top_k) if slots.is_grouped else None
            width = example[fused.down_name][0].rows if fused is not None else 0
            can_sum = weight_type in WEIGHT_TYPES and combines_like_torch(top_k, width, weight_type, threads)
            if fused is None or not can_sum:
                self._token_steps[key] = None
            else:
                sizes = (slots.num_experts, top_k, width, weight_type)
                experts = TokenExperts(fused, slots.addresses, example, *sizes)
                self._token_steps[key] = TokenStep(slots, self.counters, experts)
        return None if adapted_of(module) else self._token_steps[key]

    def forward_token(
        self,
        step: TokenStep | None,
        layer: int,
        module: Any,
        x_1D: torch.Tensor,
        expert_1K: torch.Tensor,
        weight_1K: torch.Tensor,
        ending: Ending,
        added_to: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """What a feed-forward makes of one token that nobody `listens` to, added to other numbers.

        Args:
            step: that of the layer, from `token_step`.
            layer: number of the MoE layer.
            module: its experts.
            x_1D: hidden numbers, contiguous and bfloat16.
            expert_1K: ids, contiguous.
            weight_1K: combine weights, contiguous.
            ending: what the feed-forward does with what `forward` gives.
            added_to: D bfloat16 numbers; or None.
            out: room for as many; written.
        """
        self.changes.enter_process()
        with self.changes.lock:
            self.changes.begin()
            x, sums = x_1D.data_ptr(), None if added_to is None else added_to.data_ptr()
            if step is None or not step(x, expert_1K, weight_1K.data_ptr(), ending.terms, sums, out.data_ptr()):
                with torch.no_grad():
                    slots = self.layers[layer]
                    given = slots.begin(x_1D, expert_1K, weight_1K)
                    ending.finish(self._computed(slots, module, x_1D, given, weight_1K), x, sums, out)
                    slots.end()
            self.store.expect_open()
            self.changes.finish()

    def _fused_experts(self, layer: int, module: Any, top_k: int) -> FusedExperts | None:
        key = (layer, top_k, torch.get_num_threads())
        if key not in self._fused:
            self._fused[key] = fuse_experts(module, self.store.forms[layer], top_k, self.matvecs)
        return self._fused[key]

    def close(self) -> None:
        """Stop reading and give the memory of slots and window back; the model cannot run afterwards."""
        self.changes.enter_process()
        with self.changes.lock:
            if self.gpu is not None:
                self.gpu.close()
            self.store.close()
            for slots in self.layers:
                slots.close()
            if self.window is not None:
                self.window.close()
            if self.units is not None:
                self.units.close()

    def _look_ahead(self, layer: int, x_TD: torch.Tensor, expert_TK: torch.Tensor) -> None:
        """Once this layer's reads are on their way: start what the next layers will probably ask for."""
        if len(expert_TK) > 1:
            self._fill_next(layer, expert_TK.numel())
        elif self.prefetcher is not None:
            self.prefetcher.look_ahead(layer, x_TD, expert_TK, self.layers)

    def _fill_next(self, layer: int, num_rows: int) -> None:
        """Many rows ask for nearly every expert: read into the next layer's free slots what it does not have."""
        if layer + 1 == len(self.layers) or self.gpu is not None:
            return
        slots = self.layers[layer + 1]
        if num_rows >= ROWS_FOR_ALL * len(slots.own):
            missing = [expert for expert in slots.own if expert not in slots]
            for expert in missing[: slots.num_free]:
                slots.read_ahead(expert, (), slots.num_experts)

    def _forward_eager(
        self, slots: LayerSlots, module: Any, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> torch.Tensor:
        expert_ids, counts = expert_TK.unique(return_counts=True)
        num_rows = {
            expert: count
            for expert, count in zip(expert_ids.tolist(), counts.tolist(), strict=True)
            if 0 <= expert < slots.num_experts
        }
        step = ExpertStep(slots, self._plain_weights(slots), self.counters, num_rows, expert_TK)
        step.prepare()
        slots.deepen()
        return eager_forward(module, step.fetch, slots.num_experts, x_TD, expert_TK, weight_TK)


@torch.compiler.disable
def offloaded_experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts function `expertier_offload` of transformers' experts interface."""
    place = getattr(self, PLACE, None)
    if place is None:
        raise ValueError(
            f'experts_implementation="{IMPLEMENTATION}" needs a model that was loaded by offload.load(); '
            f"this {type(self).__name__} was not"
        )
    runtime, layer = place
    expect_numbers_in_memory(hidden_states, top_k_index, top_k_weights)
    expect_no_gradient(hidden_states, top_k_weights)
    result: torch.Tensor = runtime.forward(layer, self, hidden_states, top_k_index, top_k_weights)
    return result


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, offloaded_experts_forward)
