"""How the GPU's memory is divided into slots."""

from collections.abc import Sequence
from typing import Any

from routing.ground.quantity import parse_size

from ...checkpoint.experts import experts_modules
from ...formats.form import Form
from ...memory.budget import AUTO_SHARE
from ..lanes import Lane
from ..rows import biases_of
from ..slots import slot_shapes
from .budget import ring_slots

UNLIMITED = 1 << 62
"""More bytes than any GPU has; the lane cuts it down to the whole memory."""


def expect_forms_on_gpu(forms: Sequence[Form]) -> None:
    """Refuse experts that the GPU tier cannot compute with as they are stored.

    Raises:
        ValueError: if there are any.
    """
    for form in forms:
        if not form.reaches_gpu:
            raise ValueError(
                f"the GPU tier does not read {form.name} experts yet; pack without --compress for it, or leave the "
                'packed copy out; quantised experts need `write_pack(form="plain")`'
            )


def gpu_slot_bytes(model: Any, forms: Sequence[Form]) -> tuple[list[int], int]:
    """Bytes of a slot in each layer, and of the rings that prefill passes through.

    Raises:
        ValueError: if the GPU tier cannot compute with the stored bytes of a layer.
    """
    expect_forms_on_gpu(forms)
    modules = experts_modules(model).values()
    layers = [form.layer for form in forms]
    shapes = [slot_shapes(layer, biases_of(module)) for layer, module in zip(layers, modules, strict=True)]
    sizes = [
        layer.plain_bytes + sum(bias_E[0].nbytes for bias_E in biases_of(module).values())
        for layer, module in zip(layers, modules, strict=True)
    ]
    ring = ring_slots(max(layer.num_experts for layer in layers))
    return sizes, ring * sum(dict(zip(shapes, sizes, strict=True)).values())


def gpu_limit(gpu_memory: str | int, lane: Lane | None) -> int:
    """The GPU's budget in bytes.

    Args:
        gpu_memory: a size, or `"auto"` for a share of what is free on `lane`.
        lane: the GPU that is there; None plans for one that is elsewhere.

    Raises:
        ValueError: if the size cannot be read, or is `"auto"` without a GPU.
    """
    if gpu_memory != "auto":
        return parse_size(gpu_memory)
    if lane is None:
        raise ValueError('gpu_memory="auto" needs a GPU that is here; name a size such as 8GiB')
    return int(AUTO_SHARE * lane.available_bytes())


def hold_to(lane: Lane, limit_bytes: int, *, is_given: bool) -> None:
    """Let allocations beyond the budget fail, where the caller named it; an automatic one only guides the plan."""
    lane.limit(limit_bytes if is_given else UNLIMITED)
