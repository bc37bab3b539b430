"""Loads as the counts that engines read: whole numbers, large enough that shares survive rounding."""

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
# The largest count after scaling. Engines hold counts in float32 (24 bits) or int64; 1e9 keeps nine digits for the
# latter and overflows neither when 256 experts are summed.
LARGEST_COUNT = 1e9


def whole_counts(load_LE: Float) -> Float:
    """Counts with the ratios of the loads: whole loads as they are, shares scaled by one factor for all layers.

    Args:
        load_LE: [L, E] tokens or shares.

    Returns:
        Whole numbers as float64; a load above 0 stays above 0.

    Raises:
        ValueError: if a load is NaN, infinite or negative.
    """
    if not np.isfinite(load_LE).all() or (load_LE < 0).any():
        raise ValueError("loads must be finite and not negative; solve the plan again with such loads")
    largest = float(load_LE.max(initial=0))
    if largest == 0 or np.array_equal(load_LE, np.rint(load_LE)):
        return load_LE
    # dividing first: 1e9 / 1e-320 would overflow
    scaled = np.rint(load_LE / largest * LARGEST_COUNT)
    return np.asarray(np.where(load_LE > 0, np.maximum(scaled, 1), 0))
