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


def _rows(row_P: Integer, layers: int, gpus: int) -> Integer:
    map_LP = np.tile(row_P.astype(np.int64), (layers, 1))
    is_double = (np.diff(np.sort(map_LP[:1].reshape(gpus, -1), axis=1), axis=1) == 0).any()
    return separate_copies(map_LP, gpus) if is_double else map_LP
