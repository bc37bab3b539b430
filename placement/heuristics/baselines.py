"""Placements that look at no data: what engines do by default, and what any solver has to beat.

Shapes: L layers, E experts, G GPUs, P slots.
"""

import numpy as np
from numpy.typing import NDArray

from .lpt import separate_copies

Integer = NDArray[np.int64]


def contiguous_LP(layers: int, experts: int, slots: int, gpus: int) -> Integer:
    """Experts in order, then again from 0 for the replicas: the initial layout of vLLM and SGLang."""
    row_P = np.arange(slots) % experts
    return _rows(row_P, layers, gpus)


def round_robin_LP(layers: int, experts: int, slots: int, gpus: int) -> Integer:
    """Slot s of GPU g holds expert (s * G + g) mod E: vLLM's `round_robin`."""
    row_P = (np.arange(slots).reshape(-1, gpus).T % experts).reshape(-1)
    return _rows(row_P, layers, gpus)


def random_LP(layers: int, experts: int, slots: int, gpus: int, seed: int) -> Integer:
    """Every layer shuffled; replicas are of experts drawn without repetition as long as possible."""
    random = np.random.default_rng(seed)
    rounds = -(-slots // experts)
    rows = [
        random.permutation(np.concatenate([random.permutation(experts) for _ in range(rounds)])[:slots])
        for _ in range(layers)
    ]
    map_LP = np.array(rows, np.int64)
    return separate_copies(map_LP, gpus) if slots > experts else map_LP


def biased_counts_LE(load_LE: NDArray[np.float64], slots: int, gpus: int) -> Integer:
    """The hottest experts on every GPU, as many as the extra slots pay for; the rest goes copy by copy to the next.

    Source: ROCm/ATOM, pull request 1210, where full copies of the hottest served 10 % more than EPLB's counts.
    """
    L, E = load_LE.shape
    count_LE = np.ones((L, E), np.int64)
    order_LE = np.argsort(-load_LE, axis=1, kind="stable")
    whole, rest = divmod(slots - E, gpus - 1) if gpus > 1 else (0, 0)
    np.put_along_axis(count_LE, order_LE[:, :whole], gpus, axis=1)
    if whole < E:
        count_LE[np.arange(L), order_LE[:, whole]] += rest
    return count_LE


def _rows(row_P: Integer, layers: int, gpus: int) -> Integer:
    map_LP = np.tile(row_P.astype(np.int64), (layers, 1))
    is_double = (np.diff(np.sort(map_LP[:1].reshape(gpus, -1), axis=1), axis=1) == 0).any()
    return separate_copies(map_LP, gpus) if is_double else map_LP
