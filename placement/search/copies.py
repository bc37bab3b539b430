"""Copy counts chosen together with where the copies go, for balance.

The counts of `replicate_LE` make the heaviest copy as light as possible. That is best while copies are many and small.
Where a few experts carry nearly everything, whole copies have to fit on GPUs: two experts of equal load on 8 GPUs are
level with 4 copies each, and not with 5. So fewer copies of the hot experts are tried as well, the rest of the slots
going to the lightest experts, and later single slots change their expert at random before swaps level the layer again.
Shapes: W scenarios, L layers, E experts, G GPUs, P slots.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..contract.problem import Problem
from ..heuristics.lpt import lpt_LP
from ..heuristics.replication import replicate_LE, slots_of
from ..heuristics.swaps import balance_by_swaps
from .levels import peaks_L

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
# How many totals of useful copies are tried. With all 9 of 8 spare slots the start of six layers with 2 to 7 hot
# experts of 32 fell from 1.22..1.56 to 1.05..1.22; more of them cost time in proportion.
MOST_TOTALS = 17
EVEN_CHANCE = 0.2  # share of the mean load that every expert has in the lottery for a slot, so that cold ones win some


def choose_counts(problem: Problem, weight_WLE: Float, map_LP: Integer, target_L: Float, deadline: float) -> Integer:
    """The best map of each layer over several totals of useful copies, `map_LP` included.

    Args:
        problem: has more slots than experts.
        weight_WLE: loads, every scenario on the same scale.
        map_LP: what is to be beaten.
        target_L: fullest GPU (load over speed) at which a layer is good enough.
        deadline: `time.monotonic()` at which to stop.
    """
    speed_G, best_LP = problem.cluster.speed_G, map_LP.copy()
    peak_L = peaks_L(weight_WLE, map_LP, speed_G)
    layers = np.flatnonzero(peak_L > target_L)
    if not len(layers):
        return best_LP
    some_WLE = weight_WLE[:, layers]
    for count_LE in _counts(some_WLE, problem.num_slots, problem.num_gpus):
        start_LP = lpt_LP(some_WLE / count_LE, slots_of(count_LE), speed_G)
        tried_LP = balance_by_swaps(
            some_WLE / count_LE, start_LP, speed_G, target_L=target_L[layers], deadline=deadline
        )
        tried_L = peaks_L(some_WLE, tried_LP, speed_G)
        better = tried_L < peak_L[layers]
        best_LP[layers[better]], peak_L[layers[better]] = tried_LP[better], tried_L[better]
    return best_LP


def change_counts(map_LP: Integer, load_LE: Float, gpus: int, random: np.random.Generator) -> Integer:
    """One to three slots of each layer, whose expert has another copy, take an expert that their GPU lacks.

    Args:
        map_LP: experts GPU by GPU.
        load_LE: hot experts are drawn in proportion to it, cold ones at `EVEN_CHANCE` of its mean at least.
        gpus: G; each owns an equal part of a row of the map.
        random: source of the draws.
    """
    changed_LP = map_LP.copy()
    for row_P, load_E in zip(changed_LP, load_LE, strict=True):
        chance_E = load_E + EVEN_CHANCE * max(float(load_E.mean()), 1e-30)
        for _ in range(int(random.integers(1, 4))):
            spare = np.flatnonzero(np.bincount(row_P, minlength=len(load_E))[row_P] > 1)
            if not len(spare):
                break
            slot = int(random.choice(spare))
            lacked_E = chance_E.copy()
            lacked_E[row_P.reshape(gpus, -1)[slot * gpus // len(row_P)]] = 0
            if lacked_E.any():
                row_P[slot] = random.choice(len(load_E), p=lacked_E / lacked_E.sum())
    return changed_LP


def _counts(weight_WLE: Float, slots: int, gpus: int) -> Iterator[Integer]:
    """[L, E] copies that use all slots: few to all of them where they help, the others on the lightest experts."""
    L, E = weight_WLE.shape[1:]
    lightest_LE = np.argsort(weight_WLE.max(axis=0), axis=1, kind="stable")
    for total in np.unique(np.linspace(E, slots, min(MOST_TOTALS, slots - E + 1)).astype(int)):
        count_LE = replicate_LE(weight_WLE, int(total), gpus)
        for layer in range(L):
            order_E = lightest_LE[layer]
            room_E = gpus - count_LE[layer, order_E]
            before_E = np.cumsum(room_E) - room_E
            count_LE[layer, order_E] += np.clip(slots - total - before_E, 0, room_E)
        yield count_LE
