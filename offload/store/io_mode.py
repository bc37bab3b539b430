"""Past the kernel's page cache, or through it?"""

import os
from collections.abc import Sequence

from ..formats.form import Form
from ..memory.budget import MemoryPlan, available_memory

IO_MODES = ("auto", "direct", "cached")
SAMPLES = 64
"""Experts that are asked whether they are in the page cache: one byte each. The share is right to about 0.06 (one
standard deviation at 0.5), which is enough to tell a cached file from an uncached one."""
SPARE_SHARE = 0.8
"""Of the memory beside weights and activations, what all experts may take before the page cache is not relied on: the
kernel needs room for other files. Other values were not tried."""
ALL_SLOTS = 0.95
"""Share of all experts from which on slots hold practically everything, so that the page cache would hold it twice.
Other values were not tried."""


def wants_direct(io: str, plan: MemoryPlan, forms: Sequence[Form]) -> bool:
    """Whether to read with O_DIRECT.

    The page cache helps where memory is left for it and the slots do not hold everything, or where it holds the files
    already. Elsewhere it only costs: a copy, and pages that slots could have had.

    Args:
        io: name in IO_MODES; all but `auto` decide.
        plan: the budget and the slots.
        forms: how each layer's experts are stored.

    Raises:
        ValueError: if `io` is unknown.
    """
    if io not in IO_MODES:
        raise ValueError(f"io must be one of {', '.join(IO_MODES)}; got {io!r}")
    if io != "auto":
        return io == "direct"
    if not forms or not _reads_direct(forms[0]):
        return False
    num_experts = sum(form.layer.num_experts for form in forms)
    nbytes = sum(form.layer.num_experts * form.expert_bytes for form in forms)
    if nbytes > SPARE_SHARE * (min(available_memory(), plan.limit_bytes) - plan.fixed_bytes):
        return True
    return sum(plan.num_slots) >= ALL_SLOTS * num_experts and cached_share(forms) < 0.5


def cached_share(forms: Sequence[Form]) -> float:
    """Share of experts, of a sample, whose first byte is read without the disk; 0 where the kernel does not say."""
    if not hasattr(os, "RWF_NOWAIT"):
        return 0.0
    places = [(form, expert) for form in forms for expert in range(form.layer.num_experts)]
    sample = places[:: max(1, len(places) // SAMPLES)]
    return sum(_is_cached(form, expert) for form, expert in sample) / len(sample)


def _is_cached(form: Form, expert: int) -> bool:
    descriptor = os.open(form.file_of(expert), os.O_RDONLY | os.O_CLOEXEC)
    # RWF_NOWAIT fails instead of going to the disk; so asking does not fill the cache
    try:
        return os.preadv(descriptor, [bytearray(1)], form.offset_of(expert), os.RWF_NOWAIT) == 1
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _reads_direct(form: Form) -> bool:
    """Whether the file system of a layer's experts knows O_DIRECT."""
    try:
        os.close(os.open(form.file_of(0), os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT))
    except (OSError, AttributeError):
        return False
    return True
