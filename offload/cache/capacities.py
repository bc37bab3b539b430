"""How many slots each layer should get: more where a slot saves more misses, as a trace shows. Without torch."""

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def spread_by_gain(hits_LC: NDArray[np.int64], total_slots: int, least_L: Sequence[int]) -> list[int]:
    """Slots per layer that together hit most, at least `least_L` each and `total_slots` in total.

    Greedy on the upper concave hull of each layer's hits, which is optimal for concave hit curves.

    Raises:
        ValueError: if the minimum is more than the total.
    """
    if sum(least_L) > total_slots:
        raise ValueError(f"{total_slots} slots are fewer than the {sum(least_L)} that the layers need at least")
    slots = list(least_L)
    queue = [(*_best_step(hits, slots[layer]), layer) for layer, hits in enumerate(hits_LC)]
    heapq.heapify(queue)
    left = total_slots - sum(slots)
    while queue and left:
        gain, step, layer = heapq.heappop(queue)
        if gain == 0 or step == 0:
            continue
        step = min(step, left)
        slots[layer] += step
        left -= step
        if slots[layer] < hits_LC.shape[1] - 1:
            heapq.heappush(queue, (*_best_step(hits_LC[layer], slots[layer]), layer))
    return slots


def _best_step(hits: NDArray[np.int64], start: int) -> tuple[float, int]:
    """Minus the best hits per added slot from `start`, and how many slots that takes."""
    more = np.arange(1, len(hits) - start)
    if not len(more):
        return 0.0, 0
    rate = (hits[start + 1 :] - hits[start]) / more
    best = int(np.argmax(rate))
    return -float(rate[best]), int(more[best])
