"""omni-infer placement: .npy of 0/1, [devices, MoE layers, experts]; MoE layers by ordinal.

Source: omni-infer omni/accelerators/placement (c8bc2bb, MIT).
"""

from pathlib import Path

import numpy as np

from routing.ground.files import atomic_write

from ..checking.check import doubled_copies
from ..contract.plan import Plan
from .reading import MAX_BYTES


def export_omni(plan: Plan, path: Path) -> None:
    """Write the int32 array.

    Raises:
        ValueError: if a device holds two copies of one expert, which 0/1 cannot say.
    """
    if doubled := doubled_copies(plan):
        raise ValueError(
            f"{doubled} slots hold a second copy of an expert on their device, which a 0/1 array cannot say; "
            "solve again with --solver auto (EPLB's plans may double copies)"
        )
    with atomic_write(path, "wb") as file:
        np.save(file, plan.copies_LEG.transpose(2, 0, 1).astype(np.int32), allow_pickle=False)


def validate_omni(path: Path, plan: Plan | None = None) -> None:
    """Read the array back.

    Raises:
        ValueError: if it is not 0/1 integers [devices, layers, experts], leaves out an expert, or is not the plan.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES} bytes")
    array = np.load(path, allow_pickle=False)
    if array.ndim != 3 or array.dtype not in (np.int32, np.int64) or not np.isin(array, (0, 1)).all():
        raise ValueError(f"{path}: expected int32 or int64 0/1 [devices, layers, experts]; got {array.dtype}")
    if not (array.sum(axis=0) > 0).all():
        raise ValueError(f"{path}: some expert is on no device")
    if plan and not np.array_equal(array, plan.copies_LEG.transpose(2, 0, 1)):
        raise ValueError(f"{path}: the array is not what the plan says")
