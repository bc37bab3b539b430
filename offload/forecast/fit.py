"""Will it fit? What a model needs in memory, from the headers of its checkpoint, without loading it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from routing.ground.hardware import Hardware
from routing.ground.quantity import parse_size

from ..checkpoint.experts import ExpertLayer, experts_modules, weight_names
from ..checkpoint.model_folder import skeleton_of
from ..compute.resident import embedding_bytes, expected_saving
from ..gpu.budget import plan_gpu, split_needs
from ..gpu.cost import GpuPrediction, predict_gpu_decode
from ..gpu.planning import gpu_slot_bytes
from ..memory.budget import AUTO_SHARE, MemoryPlan, Needs, available_memory, plan_memory
from ..memory.cost import DecodeWork, Prediction, expected_hit_rate, predict_decode
from ..runtime.needs import experts_per_token, memory_needs
from ..store.packing import read_pack
from ..store.store import record_of

PROCESS_BYTES = 450 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """What a model needs and what a budget buys.

    `plan` is None if the budget is too small; `shortfall` then says what would do. `gpu_plan` is None without a GPU.
    `unread_bytes` are resident weights of which a token reads a row: the embedding of its input.
    """

    layers: list[ExpertLayer]
    top_k: int
    needs: Needs
    unread_bytes: int
    slot_bytes_L: list[int]
    plan: MemoryPlan | None
    shortfall: str | None
    gpu_plan: MemoryPlan | None = None

    @property
    def expert_bytes(self) -> int:
        return sum(layer.num_experts * layer.expert_bytes for layer in self.layers)

    def predict(self, hardware: Hardware, *, is_fast: bool, hit_rate: float | None = None) -> Prediction:
        """Seconds per decoded token; without a hit rate, one that is typical for the share of experts in memory.

        Raises:
            ValueError: if the model does not fit.
        """
        if self.plan is None:
            raise ValueError(f"nothing to predict: {self.shortfall}")
        experts = sum(layer.num_experts for layer in self.layers)
        if hit_rate is None:
            share = sum(self.plan.num_slots) / experts
            hit_rate = expected_hit_rate(share, self.top_k, self.layers[0].num_experts)
        work = DecodeWork(
            num_layers=len(self.layers),
            experts_per_layer=self.top_k,
            expert_bytes=self.expert_bytes // experts,
            resident_bytes=self.needs.weight_bytes - self.unread_bytes,
            hit_rate=hit_rate,
        )
        return predict_decode(work, hardware, is_fast=is_fast, is_compressed=self.layers[0].compressed_E is not None)

    def predict_gpu(self, hardware: Hardware) -> GpuPrediction:
        """Seconds per decoded token with the GPU tier, at hit rates that are typical for the shares of experts.

        Raises:
            ValueError: if the model does not fit, or the hardware has no GPU.
        """
        if self.plan is None or self.gpu_plan is None:
            raise ValueError(f"nothing to predict: {self.shortfall}")
        experts = sum(layer.num_experts for layer in self.layers)
        on_gpu = sum(self.gpu_plan.num_slots)
        shares = (on_gpu / experts, (on_gpu + sum(self.plan.num_slots)) / experts)
        rates = [expected_hit_rate(min(share, 1), self.top_k, self.layers[0].num_experts) for share in shares]
        work = DecodeWork(
            num_layers=len(self.layers),
            experts_per_layer=self.top_k,
            expert_bytes=self.expert_bytes // experts,
            resident_bytes=self.gpu_plan.weight_bytes,
            hit_rate=rates[1],
        )
        return predict_gpu_decode(work, rates[0], hardware)

    @property
    def active_bytes(self) -> int:
        """Bytes of the experts that one token uses."""
        return sum(min(self.top_k, layer.num_experts) * layer.expert_bytes for layer in self.layers)

    def as_json(self) -> dict[str, Any]:
        slots = list(self.plan.num_slots) if self.plan else None
        return {
            "fits": self.plan is not None,
            "reason": self.shortfall,
            "moe_layers": len(self.layers),
            "experts_per_layer": [layer.num_experts for layer in self.layers],
            "experts_per_token": self.top_k,
            "expert_bytes": self.expert_bytes,
            "active_expert_bytes_per_token": self.active_bytes,
            "resident_weight_bytes": max(self.needs.weight_bytes, self.gpu_plan.weight_bytes if self.gpu_plan else 0),
            "kv_bytes": max(self.needs.kv_bytes, self.gpu_plan.kv_bytes if self.gpu_plan else 0),
            "slots_per_layer": slots,
            "gpu_slots_per_layer": None if self.gpu_plan is None else list(self.gpu_plan.num_slots),
            "share_of_experts_in_memory": None
            if slots is None
            else sum(slots) / sum(layer.num_experts for layer in self.layers),
        }


def fit(
    path_or_id: str | Path,
    *,
    cpu_memory: str | int = "auto",
    gpu_memory: str | int | None = None,
    context: int = 2048,
    io_threads: int = 4,
    pack: str | Path | None = None,
) -> Fit:
    """What `load` would do with these budgets and this packed copy; no GPU has to be there for `gpu_memory`.

    Raises:
        ValueError: if the checkpoint is damaged, its experts cannot be offloaded, or a budget is not a size.
    """
    skeleton, entries, layers = skeleton_of(path_or_id)
    if pack is not None:
        layers = read_pack(Path(pack), layers, entries).layers
    config, dtype = skeleton.config, skeleton.dtype
    for module in experts_modules(skeleton).values():
        for name in weight_names(module):
            delattr(module, name)
    top_k = experts_per_token(config)
    needs = memory_needs(config, skeleton, layers, dtype, context, io_threads, PROCESS_BYTES)
    if any(layer.compressed_E is not None for layer in layers):
        needs = replace(needs, weight_bytes=needs.weight_bytes - expected_saving(skeleton))
    if gpu_memory is not None:
        gpu_bytes_L, ring_bytes = gpu_slot_bytes(skeleton, layers)
        needs, gpu_needs = split_needs(needs, ring_bytes)
    slot_bytes_L = [record_of(layer).slot_bytes for layer in layers]
    limit = int(AUTO_SHARE * available_memory()) if cpu_memory == "auto" else parse_size(cpu_memory)
    experts_L = [layer.num_experts for layer in layers]
    gpu_limit = None if gpu_memory is None else parse_size(gpu_memory)
    plan, gpu_plan, shortfall = None, None, None
    try:
        if gpu_limit is not None:
            gpu_plan = plan_gpu(gpu_limit, gpu_needs, gpu_bytes_L, experts_L, top_k)
        plan = plan_memory(limit, needs, slot_bytes_L, experts_L, top_k)
    except ValueError as error:
        shortfall = str(error)
    return Fit(
        layers=layers,
        top_k=top_k,
        needs=needs,
        unread_bytes=embedding_bytes(skeleton),
        slot_bytes_L=slot_bytes_L,
        plan=plan,
        shortfall=shortfall,
        gpu_plan=gpu_plan,
    )
