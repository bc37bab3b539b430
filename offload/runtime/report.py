"""`model.offload`: what the offloading did, and the routing it saw."""

import time
from pathlib import Path
from typing import Any

import torch

from routing.ground.hardware import Hardware
from routing.traces import RoutingTrace

from ..compute.resident import embedding_bytes, weight_bytes
from ..memory.budget import MemoryPlan, describe, peak_bytes
from ..memory.cost import DecodeWork, Prediction, predict_decode
from ..ram.counters import AheadCounters
from .runtime import OffloadRuntime


class Offload:
    """The offloading of one model.

    Args:
        model: the model; its calls are timed.
        runtime: its experts.
        plan: how the memory budget was divided.
        policy: name of the cache policy.
    """

    def __init__(self, model: Any, runtime: OffloadRuntime, plan: MemoryPlan, policy: str) -> None:
        self.plan, self.policy = plan, policy
        self._model, self._runtime = model, runtime
        self._call_started_s = 0.0
        self._call_tokens = 0
        self._busy_before_s = runtime.store.busy_s
        model.register_forward_pre_hook(self._before_call, with_kwargs=True)
        model.register_forward_hook(self._after_call, with_kwargs=True)

    @property
    def num_slots(self) -> tuple[int, ...]:
        return self.plan.num_slots

    @property
    def lane(self) -> Any:
        """The GPU's streams; None on the CPU."""
        return None if self._runtime.gpu is None else self._runtime.gpu.lane

    def report(self) -> dict[str, Any]:
        """Hits, misses, bytes, seconds and memory since loading or `reset`, JSON-serialisable."""
        counters, prefetch = self._runtime.counters, self._prefetch()
        summary = counters.summary()
        return {
            **summary,
            "bytes_read": summary["bytes_read"] + prefetch["bytes_read"],
            "bytes_missed": sum(
                layer.misses * slots.expert_bytes
                for layer, slots in zip(counters.layers, self._runtime.layers, strict=True)
            ),
            **self._floor(),
            "policy": self.policy,
            "slots_per_layer": list(self.plan.num_slots),
            "is_direct": self._runtime.store.is_direct,
            "peak_memory_bytes": peak_bytes(),
            "memory": dict(describe(self.plan)),
            "prefetch": prefetch,
            **({} if self._runtime.gpu is None else {"gpu": self._runtime.gpu.report()}),
            "hit_rate_L": [layer.hits / max(layer.hits + layer.misses, 1) for layer in counters.layers],
        }

    def predict(self, hardware: Hardware, hit_rate: float, top_k: int) -> Prediction:
        """What a decoded token should take on the CPU, to stand beside what it took.

        Args:
            hardware: the rates of this machine.
            hit_rate: while decoding.
            top_k: experts that a token uses in each layer.
        """
        layers = self._runtime.layers
        work = DecodeWork(
            num_layers=len(layers),
            experts_per_layer=top_k,
            expert_bytes=sum(slots.expert_bytes for slots in layers) // len(layers),
            resident_bytes=weight_bytes(self._model) - embedding_bytes(self._model),
            hit_rate=hit_rate,
        )
        is_cached = not self._runtime.store.is_direct
        is_fast = self._runtime.matvecs.arithmetic == "fast"
        rate = layers[0].form.token_rate(hardware, is_fast=is_fast)
        return predict_decode(work, hardware, rate=rate, is_cached=is_cached)

    def _floor(self) -> dict[str, Any]:
        """How long the disk was busy: no schedule of the same reads can be quicker, whatever is computed meanwhile."""
        busy_s, achieved_s = self._runtime.store.busy_s - self._busy_before_s, sum(self._runtime.counters.step_s)
        return {
            "floor_s": busy_s,
            "achieved_s": achieved_s,
            "share_of_floor": busy_s / achieved_s if achieved_s else None,
        }

    def _prefetch(self) -> dict[str, Any]:
        total = {
            name: sum(getattr(layer.ahead_counters, name) for layer in self._runtime.layers)
            for name in ("issued", "useful", "late", "wasted", "bytes_read")
        }
        return {**total, "is_active": self._runtime.prefetcher is not None and self._runtime.prefetcher.is_active}

    def reset(self) -> None:
        """Start counting anew; what is cached stays."""
        self._runtime.counters.reset()
        self._busy_before_s = self._runtime.store.busy_s
        if self._runtime.gpu is not None:
            self._runtime.gpu.reset()
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

    @torch.compiler.disable
    def _before_call(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        batch, length = (tokens.shape[0], tokens.shape[1]) if isinstance(tokens, torch.Tensor) else (1, 1)
        self._call_tokens = length
        if self._runtime.recorder is not None:
            cache = kwargs.get("past_key_values")
            past = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
            mask = kwargs.get("attention_mask")
            is_mask = isinstance(mask, torch.Tensor) and mask.dim() == 2
            self._runtime.recorder.begin_call(batch, length, past, mask.bool().cpu().numpy() if is_mask else None)
        self._call_started_s = time.perf_counter()

    @torch.compiler.disable
    def _after_call(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._runtime.recorder is not None:
            self._runtime.recorder.end_call()
        if self._runtime.prefetcher is not None:
            tried = self._prefetch()
            self._runtime.prefetcher.judge(tried["issued"], tried["useful"], tried["late"])
        counters = self._runtime.counters
        counters.step_s.append(time.perf_counter() - self._call_started_s)
        counters.step_tokens.append(self._call_tokens)
