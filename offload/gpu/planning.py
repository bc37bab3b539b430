"""How the GPU's memory is divided into slots."""

from collections.abc import Sequence
from typing import Any

from routing.ground.quantity import parse_size

from ..checkpoint.experts import ExpertLayer, experts_modules
from ..memory.budget import AUTO_SHARE, MemoryPlan, Needs
from .budget import plan_gpu, ring_slots
from .lanes import Lane
from .rows import biases_of
from .slots import slot_shapes

UNLIMITED = 1 << 62


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
