"""`model.offload`: what the offloading did, what it should have taken, and the routing it saw."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from routing.ground.hardware import Hardware
from routing.ground.quantity import format_size, parse_size
from routing.traces import RoutingTrace

from ..compute.levels import described
from ..compute.resident import embedding_bytes, weight_bytes
from ..formats.lossy.levelled import LevelledForm
from ..formats.resident.linears import count_stored
from ..memory.budget import MemoryPlan, describe, machine_bytes, peak_bytes
from ..memory.cost import DecodeWork, Prediction, predict_decode
from ..prefetch.cached_first import CachedFirst
from ..ram.counters import AheadCounters, total_ahead
from ..ram.level_slots import LevelSlots
from .calls import follow_calls
from .depths import Deepening
from .runtime import OffloadRuntime


class Offload:
    """The offloading of one model: counts since loading or `reset`, memory, recorded routing.

    Args:
        model: a model whose experts `runtime` computes; two hooks follow its calls from now on.
        runtime: keeps the counts that are reported.
        plan: how the RAM budget was divided; given back in `plan` and in the report.
        policy: name in CACHES, for the report.
        deepening: the rule that chooses depths while the model runs; None if there is none.
    """

    def __init__(
        self,
        model: Any,
        runtime: OffloadRuntime,
        plan: MemoryPlan,
        policy: str,
        deepening: Deepening | None = None,
    ) -> None:
        self.plan, self.policy, self._deepening = plan, policy, deepening
        self._model, self._runtime = model, runtime
        self._busy_before_s = runtime.store.busy_s
        self._preference: CachedFirst | None = None
        self.passes_gradients = False
        """Whether experts compute anew in a backward pass; see `gradients_pass`."""
        self.of_others: Callable[[], list[dict[str, Any]]] = list
        """Gives the reports of other processes that compute some of the experts."""
        self.at_close: list[Callable[[], None]] = []
        """Called when the model is closed: whoever works for it may end."""
        follow_calls(model, runtime)

    @property
    def num_slots(self) -> tuple[int, ...]:
        return self.plan.num_slots

    @property
    def runtime(self) -> OffloadRuntime:
        """What computes the experts: slots, counters, store."""
        return self._runtime

    @property
    def lane(self) -> Any:
        """The GPU's streams; None on the CPU."""
        return None if self._runtime.gpu is None else self._runtime.gpu.lane

    def prefer_cached(self, strength: float) -> None:
        """From now on, choose experts that are in slots with a bonus. Lossy: the output is no longer the model's.

        Args:
            strength: the bonus over the range of a token's logits, 0..1; see `CachedFirst`.

        Raises:
            ValueError: if the strength is out of range, was given before, a router is no softmax of logits, or experts
                come by units.
        """
        if not self._runtime.layers:
            raise ValueError("this model has no slots of whole experts, so none can be preferred")
        if self._preference is not None:
            raise ValueError("this model prefers cached experts already; load it anew for another strength")
        preference = CachedFirst(strength)
        preference.attach(self._model, self._runtime)
        self._preference = preference

    def resize(self, cpu_memory: str | int) -> None:
        """Run within another budget from now on: levels of experts are given up, or there is room for more.

        What is given up is what was used least lately. What there is room for is read while the model runs.

        Args:
            cpu_memory: the whole budget of the process, such as `"6GiB"`.

        Raises:
            ValueError: if depths stay as they were chosen at loading, slots were given instead of a budget, the machine
                has less, or the first levels of one token's experts do not fit.
        """
        if self._deepening is None or self._deepening.is_fixed:
            raise ValueError(
                "only a packed copy in levels changes its budget while it runs, loaded by a rule for depths "
                '(depth="hottest" or "weight") and a budget instead of cache_experts'
            )
        limit = parse_size(cpu_memory)
        if limit > machine_bytes():
            raise ValueError(f"cpu_memory={cpu_memory} is more than the {format_size(machine_bytes())} of this machine")
        plan, rooms = self._deepening.rooms(replace(self.plan, limit_bytes=limit))
        self._runtime.resize(rooms)
        self.plan = plan

    def report(self) -> dict[str, Any]:
        """Hits, misses, bytes, seconds and memory since loading or `reset`, JSON-serialisable."""
        counters, prefetch, window = self._runtime.counters, self._prefetch(), self._runtime.window
        summary, streamed = counters.summary(), {} if window is None else window.report()
        units = {} if self._runtime.units is None else self._runtime.units.report()
        return {
            **summary,
            "bytes_read": sum(each.get("bytes_read", 0) for each in (summary, prefetch, streamed, units))
            + self._deepened_bytes,
            "stall_s": summary["stall_s"] + streamed.get("stall_s", 0.0),
            "bytes_missed": sum(
                layer.misses * slots.expert_bytes
                for layer, slots in zip(counters.layers, self._runtime.layers, strict=True)
            ),
            **self._floor(),
            "policy": self.policy,
            "arithmetic": {**described(self._runtime.matvecs), **self._runtime.quickened._asdict()},
            **({} if self._preference is None else {"prefer_cached": self._preference.report()}),
            "slots_per_layer": list(self.plan.num_slots),
            "is_direct": self._runtime.store.is_direct,
            "peak_memory_bytes": peak_bytes(),
            "memory": dict(describe(self.plan)),
            "prefetch": prefetch,
            **self._levels(),
            **({} if self._runtime.gpu is None else {"gpu": self._runtime.gpu.report()}),
            **({"window": streamed} if streamed else {}),
            **({"units": units} if units else {}),
            **({"stored_linears": stored} if (stored := count_stored(self._model)) else {}),
            "hit_rate_L": [layer.hits / max(layer.hits + layer.misses, 1) for layer in counters.layers],
        }

    def predict(self, hardware: Hardware, hit_rate: float, top_k: int) -> Prediction:
        """What a decoded token should take on the CPU, to stand beside what it took.

        Args:
            hardware: measured rates (`expertier calibrate`), in bytes per second.
            hit_rate: share of experts, 0 to 1, that decoding finds in memory.
            top_k: experts that a token uses in each layer.

        Returns:
            Seconds per decoded token, and what limits them.
        """
        layers = self._runtime.layers
        work = DecodeWork(
            num_layers=len(layers),
            experts_per_layer=top_k,
            expert_bytes=sum(slots.expert_bytes for slots in layers) // max(len(layers), 1),
            resident_bytes=weight_bytes(self._model) - embedding_bytes(self._model),
            hit_rate=hit_rate,
            streamed_bytes=0 if self._runtime.window is None else self._runtime.window.plan.pass_bytes,
        )
        is_cached = not self._runtime.store.is_direct
        is_fast = self._runtime.matvecs.arithmetic != "exact"
        first = layers[0].form if layers else None
        rate = hardware.token_rate(is_fast=is_fast) if first is None else first.token_rate(hardware, is_fast=is_fast)
        return predict_decode(work, hardware, rate=rate, is_cached=is_cached)

    def _levels(self) -> dict[str, Any]:
        """Of experts in levels: what a rule does, or how many are read of an expert of each layer in the mean."""
        if self._deepening is not None:
            return {"depth_rule": self._rule(self._deepening)}
        forms = [slots.form for slots in self._runtime.layers]
        depth_L = [sum(form.depth_E) / len(form.depth_E) for form in forms if isinstance(form, LevelledForm)]
        return {"depth_L": depth_L} if depth_L else {}

    def _rule(self, deepening: Deepening) -> dict[str, Any]:
        layers = self._levelled
        uses = sum((slots.uses for slots in layers), Counter[int]())
        return {
            **asdict(deepening.choice),
            "is_lossy": True,
            "rows_by_depth": dict(sorted(uses.items())),
            "deepened": sum(slots.deepened[0] for slots in layers),
            "deepened_bytes": self._deepened_bytes,
            "layers": [slots.report() for slots in layers],
        }

    @property
    def _deepened_bytes(self) -> int:
        """Of levels that were read before anything needed them."""
        return sum(slots.deepened[1] for slots in self._levelled)

    @property
    def _levelled(self) -> list[LevelSlots]:
        return [slots for slots in self._runtime.layers if isinstance(slots, LevelSlots)]

    def _floor(self) -> dict[str, Any]:
        """How long the disk was busy: no schedule of the same reads can be quicker, whatever is computed meanwhile."""
        busy_s, achieved_s = self._runtime.store.busy_s - self._busy_before_s, self._runtime.counters.achieved_s
        return {
            "floor_s": busy_s,
            "achieved_s": achieved_s,
            "share_of_floor": busy_s / achieved_s if achieved_s else None,
        }

    def _prefetch(self) -> dict[str, Any]:
        prefetcher = self._runtime.prefetcher
        total = total_ahead(slots.ahead_counters for slots in self._runtime.layers)
        return {**vars(total), "is_active": prefetcher is not None and prefetcher.is_active}

    def reset(self) -> None:
        """Set all counts to 0; cached experts stay."""
        self._runtime.counters.reset()
        self._busy_before_s = self._runtime.store.busy_s
        if self._runtime.gpu is not None:
            self._runtime.gpu.reset()
        if self._runtime.window is not None:
            self._runtime.window.reset()
        if self._runtime.units is not None:
            self._runtime.units.reset()
        for slots in self._runtime.layers:
            slots.ahead_counters = AheadCounters()
        for levelled in self._levelled:
            levelled.reset()

    def trace(self) -> RoutingTrace:
        """The routing recorded so far.

        Raises:
            ValueError: if the model was loaded without `record_trace=True` or has not run yet.
        """
        if self._runtime.recorder is None:
            raise ValueError("this model does not record its routing; load it with record_trace=True")
        return self._runtime.recorder.trace()

    def save_trace(self, path: str | Path) -> None:
        """Write the routing recorded so far, atomically."""
        self.trace().save(path)

    def close(self) -> None:
        """Stop the reading threads and close the files; the model cannot run afterwards."""
        self._runtime.close()
        while self.at_close:
            self.at_close.pop()()
