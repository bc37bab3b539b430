"""`model.offload`: what the offloading did, what it should have taken, and the routing it saw."""

from pathlib import Path
from typing import Any

from routing.ground.hardware import Hardware
from routing.traces import RoutingTrace

from ..compute.levels import described
from ..compute.resident import embedding_bytes, weight_bytes
from ..formats.levelled import LevelledForm
from ..formats.resident.linears import count_stored
from ..memory.budget import MemoryPlan, describe, peak_bytes
from ..memory.cost import DecodeWork, Prediction, predict_decode
from ..prefetch.cached_first import CachedFirst
from ..ram.counters import AheadCounters, total_ahead
from .calls import follow_calls
from .runtime import OffloadRuntime


class Offload:
    """The offloading of one model: counts since loading or `reset`, memory, recorded routing.

    Args:
        model: a model whose experts `runtime` computes; two hooks follow its calls from now on.
        runtime: keeps the counts that are reported.
        plan: how the RAM budget was divided; given back in `plan` and in the report.
        policy: name in CACHES, for the report.
    """

    def __init__(self, model: Any, runtime: OffloadRuntime, plan: MemoryPlan, policy: str) -> None:
        self.plan, self.policy = plan, policy
        self._model, self._runtime = model, runtime
        self._busy_before_s = runtime.store.busy_s
        self._preference: CachedFirst | None = None
        self.passes_gradients = False
        """Whether experts compute anew in a backward pass; see `gradients_pass`."""
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
            ValueError: if the strength is out of range, was given before, or a router is no softmax of logits.
        """
        if self._preference is not None:
            raise ValueError("this model prefers cached experts already; load it anew for another strength")
        preference = CachedFirst(strength)
        preference.attach(self._model, self._runtime)
        self._preference = preference

    def report(self) -> dict[str, Any]:
        """Hits, misses, bytes, seconds and memory since loading or `reset`, JSON-serialisable."""
        counters, prefetch, window = self._runtime.counters, self._prefetch(), self._runtime.window
        summary, streamed = counters.summary(), {} if window is None else window.report()
        units = {} if self._runtime.units is None else self._runtime.units.report()
        return {
            **summary,
            "bytes_read": sum(each.get("bytes_read", 0) for each in (summary, prefetch, streamed, units)),
            "stall_s": summary["stall_s"] + streamed.get("stall_s", 0.0),
            "bytes_missed": sum(
                layer.misses * slots.expert_bytes
                for layer, slots in zip(counters.layers, self._runtime.layers, strict=True)
            ),
            **self._floor(),
            "policy": self.policy,
            "arithmetic": described(self._runtime.matvecs),
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
        """Mean levels that are read of an expert of each layer, where experts are stored in levels."""
        forms = [slots.form for slots in self._runtime.layers]
        depth_L = [sum(form.depth_E) / len(form.depth_E) for form in forms if isinstance(form, LevelledForm)]
        return {"depth_L": depth_L} if depth_L else {}

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
