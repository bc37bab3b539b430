"""Why a specification cannot work, and the nearest one that does."""

import numpy as np

from routing.ground.quantity import format_size

from .cluster import Cluster


def explain_slots(experts: int, slots: int, gpus: int, *, from_slots_per_gpu: bool) -> None:
    """Check that `slots` slots per layer hold `experts` experts evenly on `gpus` GPUs.

    Raises:
        ValueError: with the nearest replica counts, slots per GPU or GPU counts that work.
    """
    least = -(-experts // gpus)
    if slots < experts:
        raise ValueError(
            f"{slots // gpus} slots on each of {gpus} GPUs hold {slots} of {experts} experts; "
            f"use ep.slots_per_gpu: {least} or more, or {-(-experts // (slots // gpus))} GPUs"
        )
    if slots % gpus:
        below, above = slots // gpus * gpus, -(-slots // gpus) * gpus
        choices = [total - experts for total in (below, above) if total >= experts]
        sizes = [size for size in range(gpus, 0, -1) if slots % size == 0]
        raise ValueError(
            f"{experts} experts + {slots - experts} replicas = {slots} slots do not divide over {gpus} GPUs; "
            f"use --replicas {' or '.join(map(str, choices))}, or {sizes[0]} GPUs"
        )
    if slots > experts * gpus:
        raise ValueError(
            f"{slots - experts} replicas need more than one copy of some expert on one GPU; "
            f"use at most --replicas {experts * gpus - experts} ({experts} slots per GPU)"
        )
    if from_slots_per_gpu and slots // gpus < 1:
        raise ValueError(f"slots_per_gpu must be at least 1; got {slots // gpus}")


def explain_memory(cluster: Cluster, layers: int, slots_per_gpu: int, experts: int) -> None:
    """Check that every GPU's memory holds its slots and the spare ones, if the file gives sizes of experts and GPUs.

    Raises:
        ValueError: with the number of slots that fit and the number of GPUs that would do.
    """
    size = cluster.model.bytes_per_expert
    smallest, spare = float(np.min(cluster.memory_bytes_G)), cluster.ep.spare_slots
    if size is None or (slots_per_gpu + spare) * layers * size <= smallest:
        return
    gpu = int(np.argmin(cluster.memory_bytes_G))
    fit = max(int(smallest // (layers * size)) - spare, 0)
    needed = (slots_per_gpu + spare) * layers * size
    slots = f"{slots_per_gpu} slots" + (f" and {spare} spare ones" if spare else "")
    message = (
        f"GPU {gpu} has {format_size(smallest)} for experts, but {slots} x {layers} layers x "
        f"{format_size(size)} need {format_size(needed)}"
    )
    if fit == 0:
        fewer = ", or fewer spare slots" if spare else ""
        raise ValueError(f"{message}; not even one slot per layer fits: use larger GPUs or smaller experts{fewer}")
    enough = -(-experts // fit)
    hint = f"use {fit} slots per GPU" if fit * cluster.num_gpus >= experts else f"use at least {enough} GPUs"
    raise ValueError(f"{message}; {fit} slots fit: {hint}")
