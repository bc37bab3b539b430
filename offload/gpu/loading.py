"""What `load` does differently with a GPU: the device, the budget, and the tier itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from routing.ground.quantity import parse_size

from ..budget import AUTO_SHARE, MemoryPlan, Needs
from ..layout import ExpertLayer, experts_modules
from ..matvec import Matvecs
from ..runtime import OffloadRuntime
from .budget import plan_gpu, ring_slots
from .cuda import CudaLane
from .lanes import Lane
from .rows import biases_of
from .slots import slot_shapes
from .tier import GpuTier

UNLIMITED = 1 << 62
DEVICES = ("auto", "cpu", "cuda")
LANES: Mapping[str, type[Lane]] = {"cuda": CudaLane}


def open_lane(device: str, gpu_memory: str | int, gpu_experts: int | None) -> Lane | None:
    """The device that experts are computed on, or None for the CPU.

    `"auto"` is a GPU only if it is said how much of one may be used, because this tier's speed has not been measured.

    Raises:
        ValueError: if the device is unknown or absent, or the arguments contradict each other.
    """
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}; got {device!r}")
    wants_gpu = gpu_memory not in ("auto", 0, "0") or gpu_experts is not None
    if device == "cpu" and wants_gpu:
        raise ValueError(f'device="cpu" has no GPU slots; leave gpu_memory={gpu_memory!r} out, or use device="cuda"')
    if device == "cuda" and gpu_memory in (0, "0"):
        raise ValueError('device="cuda" with gpu_memory=0: nothing fits; give some memory, or use device="cpu"')
    if gpu_experts is not None and gpu_experts < 1:
        raise ValueError(f"gpu_experts must be at least 1 slot per layer; got {gpu_experts}")
    return LANES["cuda"]() if device == "cuda" or (device == "auto" and wants_gpu) else None


def gpu_slot_bytes(model: Any, layers: Sequence[ExpertLayer]) -> tuple[list[int], int]:
    """Bytes of a slot in each layer, and of the rings that prefill passes through.

    Raises:
        ValueError: if the experts are compressed.
    """
    if any(layer.compressed_E is not None for layer in layers):
        raise ValueError("the GPU tier does not read compressed experts yet; pack without --compress for it")
    modules = experts_modules(model).values()
    shapes = [slot_shapes(layer, biases_of(module)) for layer, module in zip(layers, modules, strict=True)]
    sizes = [
        layer.plain_bytes + sum(bias_E[0].nbytes for bias_E in biases_of(module).values())
        for layer, module in zip(layers, modules, strict=True)
    ]
    ring = ring_slots(max(layer.num_experts for layer in layers))
    return sizes, ring * sum(dict(zip(shapes, sizes, strict=True)).values())


def plan_for(
    lane: Lane,
    gpu_memory: str | int,
    gpu_experts: int | None,
    needs: Needs,
    slot_bytes_L: Sequence[int],
    experts_L: Sequence[int],
    top_k: int,
) -> MemoryPlan:
    """Divide the GPU's memory, and hold the allocator to it where a size was given.

    Raises:
        ValueError: if it is too small.
    """
    is_auto = gpu_memory == "auto"
    limit = int(AUTO_SHARE * lane.available_bytes()) if is_auto else parse_size(gpu_memory)
    num_slots = None if gpu_experts is None else [min(gpu_experts, count) for count in experts_L]
    plan = plan_gpu(limit, needs, slot_bytes_L, experts_L, top_k, num_slots)
    lane.limit(UNLIMITED if is_auto or gpu_experts is not None else limit)
    return plan


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
