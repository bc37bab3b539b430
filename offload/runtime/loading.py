"""`offload.load`: an ordinary transformers model whose experts stay on disk and visit RAM slots."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import moe  # noqa: F401  registers our own model type with transformers
from routing.ground.quantity import parse_size

from ..cache.catalogue import NEEDS_FUTURE
from ..cache.starting import read_starting_plan
from ..checkpoint.experts import ExpertLayer, experts_modules, locate_experts
from ..checkpoint.model_folder import local_folder, read_config, running_dtype_of
from ..checkpoint.resident_weights import drop_expert_weights, load_resident
from ..checkpoint.tensors import read_checkpoint
from ..compute.linears import quicken_linears
from ..compute.matvec import Matvecs
from ..compute.norms import quicken_norms
from ..compute.resident import compress_linears, move_to_huge_pages
from ..gpu.budget import split_needs
from ..gpu.devices import open_lane
from ..gpu.lanes import Lane
from ..gpu.planning import gpu_slot_bytes, plan_for
from ..gpu.tier import GpuTier
from ..memory.budget import (
    AUTO_SHARE,
    MemoryPlan,
    available_memory,
    plan_memory,
    resident_bytes,
)
from ..prefetch.find_routers import make_prefetcher
from ..prefetch.prefetch import PREDICTORS
from ..store.io_mode import wants_direct
from ..store.packing import read_pack
from ..store.store import ExpertStore, record_of
from . import runtime as _runtime
from .needs import experts_per_token, memory_needs
from .recorder import TraceRecorder
from .report import Offload
from .runtime import OffloadRuntime

DEFAULT_POLICY = "learned"


def load(
    path_or_id: str | Path,
    *,
    device: str = "auto",
    gpu_memory: str | int = "auto",
    cpu_memory: str | int = "auto",
    cache_experts: int | None = None,
    gpu_experts: int | None = None,
    policy: str = "auto",
    io: str = "auto",
    io_threads: int = 4,
    dtype: str | torch.dtype = "auto",
    context: int = 2048,
    arithmetic: str = "exact",
    pack: str | Path | None = None,
    prefetch: str | Path = "auto",
    plan: str | Path | None = None,
    record_trace: bool = False,
) -> Any:
    """Load a mixture-of-experts model without ever holding all its experts in memory.

    Args:
        path_or_id: a Hugging Face model folder with safetensors weights, or a model id.
        device: `"cuda"` puts everything outside experts on the GPU and adds a tier of GPU slots; `"auto"` does so if
            `gpu_memory` names a size, and is the CPU otherwise.
        gpu_memory: the whole budget on the GPU, such as `"8GiB"`; `"auto"` takes 90 % of what is free.
        cpu_memory: the whole budget of the process, such as `"6GiB"`; `"auto"` takes 90 % of what the machine and the
            control group leave.
        cache_experts: RAM slots per MoE layer instead of what a budget pays for.
        gpu_experts: GPU slots per MoE layer instead of what a budget pays for.
        policy: cache policy by name (see CACHES), or `"auto"`.
        io: `"direct"` reads past the page cache, `"cached"` through it, `"auto"` decides (see io_mode.py).
        io_threads: reads in flight at most.
        dtype: dtype of the running model; `"auto"` is that of the checkpoint.
        context: tokens of KV cache that the budget keeps room for.
        arithmetic: `"exact"` gives the bits of the resident model; `"fast"` computes single bfloat16 tokens with a
            kernel of our own, which is quicker and differs in the last bits; with a GPU it lets the CPU compute a share
            of the experts that are not there.
        pack: a packed copy of the experts (see write_pack) to read instead of the checkpoint's own files.
        prefetch: `"gate"`, `"transitions"` or a predictor file (.npz, `expertier trace predictor`) reads what the next
            layers will probably need while the disk is idle, and stops when it does not pay; `"plan"` reads what the
            model's routers have decided ahead (pre-gated routers, one router for all layers); `"off"`, which is what
            `"auto"` means, does not.
        plan: a plan of `expertier place tiers`: how many slots each layer gets, and the experts that are in them from
            the start; or a routing trace of the model (.npz): layers where a slot saves more misses get more slots.
        record_trace: record the routing; `model.offload.trace()` gives it.

    Returns:
        The transformers model, in eval mode; `model.offload` is its Offload.

    Raises:
        ValueError: if the checkpoint is damaged or incomplete, its experts cannot be offloaded, or the budget is too
            small.
    """
    if plan is not None and cache_experts is not None:
        raise ValueError("plan and cache_experts both say how many slots a layer has; give one of them")
    lane = open_lane(device, gpu_memory, gpu_experts)
    matvecs = Matvecs(arithmetic)
    prefetch = str(prefetch)
    if prefetch not in ("auto", "off", *PREDICTORS) and not prefetch.endswith(".npz"):
        raise ValueError(
            f"prefetch must be auto, off, one of {', '.join(PREDICTORS)}, or a predictor file (.npz); got {prefetch!r}"
        )
    policy = _policy(policy)
    folder = local_folder(path_or_id)
    entries = read_checkpoint(folder)
    config = read_config(folder)
    running_dtype = running_dtype_of(dtype, config, entries)
    process_bytes = resident_bytes()
    model = load_resident(folder, config, entries, running_dtype, _runtime.IMPLEMENTATION)
    dtypes = {name: parameter.dtype for name, parameter in model.state_dict().items()}
    layers, checksums = locate_experts(model, entries, dtypes), None
    if pack is not None:
        packed = read_pack(Path(pack), layers, entries)
        layers, checksums = packed.layers, packed.checksums
    drop_expert_weights(model)
    if any(layer.compressed_E is not None for layer in layers):
        compress_linears(model)
    if lane is None:
        move_to_huge_pages(model)
    top_k = experts_per_token(config)
    num_slots = None
    records = [record_of(layer) for layer in layers]
    slot_bytes = [record.slot_bytes for record in records]
    experts = [layer.num_experts for layer in layers]
    limit = int(AUTO_SHARE * available_memory()) if cpu_memory == "auto" else parse_size(cpu_memory)
    if cache_experts is not None:
        if cache_experts < 1:
            raise ValueError(f"cache_experts must be at least 1 slot per layer; got {cache_experts}")
        num_slots = [min(cache_experts, count) for count in experts]
    needs = memory_needs(config, model, layers, running_dtype, context, io_threads, process_bytes)
    if lane is not None:
        expect_gpu_layers(model)
        gpu_bytes, ring_bytes = gpu_slot_bytes(model, layers)
        needs, gpu_needs = split_needs(needs, ring_bytes)
        gpu_plan = plan_for(lane, gpu_memory, gpu_experts, gpu_needs, gpu_bytes, experts, top_k)
        model.to(lane.device)
        needs = replace(needs, process_bytes=resident_bytes())
    memory = plan_memory(limit, needs, slot_bytes, experts, top_k, num_slots)
    starting = None if plan is None else read_starting_plan(plan, experts)
    if starting is not None:
        least = [min(top_k, count) for count in experts]
        planned = starting.slots(slot_bytes, least, limit - memory.fixed_bytes)
        memory = plan_memory(limit, needs, slot_bytes, experts, top_k, planned)
    is_direct = wants_direct(io, memory, records)
    store = ExpertStore(model, layers, num_threads=io_threads, is_direct=is_direct, checksums=checksums)
    recorder = _recorder(layers, str(path_or_id)) if record_trace else None
    running = _runtime.OffloadRuntime(store, memory.num_slots, policy, recorder, matvecs)
    running.prefetcher = make_prefetcher(prefetch, model, layers, top_k)
    if lane is not None:
        add_gpu_tier(running, lane, model, layers, gpu_plan, matvecs)
    else:
        quicken_linears(model, matvecs)
        quicken_norms(model)
    if starting is not None:
        running.fill(starting.experts_L)
    return _attach(model, running, memory, policy)


def _recorder(layers: Sequence[ExpertLayer], source: str) -> TraceRecorder:
    metadata = {"model": source, "source": "expertier"}
    return TraceRecorder(len(layers), max(layer.num_experts for layer in layers), metadata)


def _attach(model: Any, running: _runtime.OffloadRuntime, plan: MemoryPlan, policy: str) -> Any:
    for layer, module in enumerate(experts_modules(model).values()):
        module._expertier_place = (running, layer)
        module.config._experts_implementation = _runtime.IMPLEMENTATION
        if getattr(module, "is_own_loop", False):
            running.layers[layer].is_grouped = False
    if running.prefetcher is not None:
        running.prefetcher.attach(model, running)
    model.offload = Offload(model, running, plan, policy)
    return model


def _policy(name: str) -> str:
    if name in NEEDS_FUTURE:
        raise ValueError(f"policy {name} needs to know the future; it is for `simulate` only")
    return DEFAULT_POLICY if name == "auto" else name


def add_gpu_tier(
    running: OffloadRuntime,
    lane: Lane,
    model: Any,
    layers: Sequence[ExpertLayer],
    plan: MemoryPlan,
    matvecs: Matvecs,
) -> None:
    """Give a runtime its GPU tier; fast `matvecs`, whose last bits differ, let the CPU compute some misses."""
    modules = list(experts_modules(model).values())
    share = matvecs if matvecs.arithmetic == "fast" else None
    running.gpu = GpuTier(lane, layers, modules, running.layers, plan, running.counters, share)


def expect_gpu_layers(model: Any) -> None:
    """Refuse what only the CPU can compute.

    Raises:
        ValueError: if an experts module computes itself by a loop of its own.
    """
    for name, module in experts_modules(model).items():
        if getattr(module, "is_own_loop", False):
            raise ValueError(f'{type(module).__name__} ({name}) is computed on the CPU only; use device="cpu"')
