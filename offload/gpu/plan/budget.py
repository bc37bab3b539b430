"""GPU memory: what besides experts has to fit, and how many expert slots the rest pays for. Without torch."""

from collections.abc import Sequence
from dataclasses import replace

from ...memory.budget import MemoryPlan, Needs, plan_memory

CONTEXT_BYTES = 600 << 20
"""CUDA context, loaded kernels and cuBLAS workspaces; outside of torch's allocator, so it cannot be asked for."""
RING_SLOTS = 8
"""Slots of the rings that prefill passes through: copies of one half run while kernels compute the other. More slots
make fewer, larger launches and leave fewer experts on the GPU. Not tried on a device."""
ROW_LABELS = {
    "Python and libraries": "CUDA context and kernels",
    "reading buffers": "slots that prefill passes through",
}


def ring_slots(num_experts: int) -> int:
    """Slots that experts pass through without staying: two halves, one computed while the other is filled."""
    return max(2, min(RING_SLOTS, num_experts))


def split_needs(needs: Needs, ring_bytes: int) -> tuple[Needs, Needs]:
    """What the CPU and the GPU need besides expert slots, when everything outside experts is on the GPU."""
    on_cpu = replace(needs, weight_bytes=0, kv_bytes=0, activation_bytes=0)
    return on_cpu, replace(needs, process_bytes=CONTEXT_BYTES, staging_bytes=ring_bytes)


def plan_gpu(
    limit_bytes: int,
    needs: Needs,
    slot_bytes_L: Sequence[int],
    experts_L: Sequence[int],
    top_k: int,
    num_slots: Sequence[int] | None = None,
) -> MemoryPlan:
    """Divide a GPU budget as `plan_memory` does.

    Raises:
        ValueError: if it is too small; the message says which would do.
    """
    try:
        return plan_memory(limit_bytes, needs, slot_bytes_L, experts_L, top_k, num_slots)
    except ValueError as error:
        raise ValueError(f"gpu_memory: {error}") from error


def gpu_table(plan: MemoryPlan) -> list[tuple[str, int]]:
    """What the budget goes to, for people."""
    return [(ROW_LABELS.get(name, name), size) for name, size in plan.table()]
