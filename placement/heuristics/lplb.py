"""LPLB's static part: EPLB without copies, then one copy of each GPU's hottest experts on a neighbour.

The dynamic part, a linear programme per batch, is `ep.dispatch: quota` and the rule `lp` of batches.
Source: github.com/deepseek-ai/LPLB (MIT), `Planner.update_redundancy_mapping`; its ring is the first step here.
Shapes: L layers, E experts, G GPUs, P slots.
"""

import numpy as np
from numpy.typing import NDArray

from .eplb import eplb

Integer = NDArray[np.int64]


def lplb_LP(load_LE: NDArray[np.float64], slots: int, gpus: int) -> Integer:
    """The map in which GPU i holds, as its j-th copy, the j-th hottest expert of GPU i + step j.

    Args:
        load_LE: routed tokens.
        slots: of a layer; experts and copies each divide over the GPUs, and no GPU has more copies than others it has.
        gpus: G, in a ring.

    Raises:
        ValueError: if they do not divide, or there are too many copies for one on each neighbour.
    """
    L, E = load_LE.shape
    own, rest = divmod(E, gpus)
    copies, more = divmod(slots - E, gpus)
    if rest or more or copies > min(own, gpus - 1):
        raise ValueError(
            f"lplb needs experts and copies that divide over the GPUs, at most {min(own, gpus - 1)} copies on each; "
            f"got {E} experts and {slots - E} copies on {gpus} GPUs"
        )
    own_LGC = eplb(load_LE, E, 1, 1, gpus).reshape(L, gpus, own)
    heat_LGC = np.take_along_axis(load_LE[:, None], own_LGC, axis=2)
    own_LGC = np.take_along_axis(own_LGC, np.argsort(-heat_LGC, axis=2, kind="stable"), axis=2)
    source_GC = (np.arange(gpus)[:, None] + _steps(copies, gpus)) % gpus
    copy_LGC = own_LGC[:, source_GC, np.arange(copies)]
    return np.concatenate([own_LGC, copy_LGC], axis=2).reshape(L, slots)


def _steps(copies: int, gpus: int) -> Integer:
    """How far away the sources are: 1, 2, 4, ... as on a hypercube, then what is left."""
    doubling = [1 << power for power in range(gpus.bit_length()) if 1 << power < gpus]
    return np.array([*doubling, *sorted(set(range(1, gpus)) - set(doubling))][:copies], np.int64)
