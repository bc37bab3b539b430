"""LevelState: loads of GPUs under several scenarios, and how full the fullest would be after every swap of two items.

Shapes: W scenarios, L layers, E experts, X items, G GPUs, P slots.
"""

import numpy as np
from numpy.typing import NDArray

from ..heuristics.replication import counts_of

Float = NDArray[np.float64]
Integer = NDArray[np.int64]


def peaks_L(weight_WLE: Float, map_LP: Integer, speed_G: Float) -> Float:
    """Fullest GPU (load over speed) of each layer, worst scenario."""
    count_LE = counts_of(map_LP, weight_WLE.shape[2])
    slot_WLP = np.take_along_axis(
        weight_WLE / np.maximum(count_LE, 1), np.broadcast_to(map_LP, (len(weight_WLE), *map_LP.shape)), axis=2
    )
    load_WLG = slot_WLP.reshape(*slot_WLP.shape[:2], len(speed_G), -1).sum(axis=3)
    return np.asarray((load_WLG / speed_G).max(axis=(0, 2)))


class LevelState:
    """Fullest over mean GPU, averaged over scenarios.

    Args:
        weight_WX: load of each item, each scenario summing to 1 (or all 0).
        gpu_X: GPU of each item.
        speed_G: relative speed of each GPU, positive.
        worst: take the worst scenario instead of the mean of all.
    """

    def __init__(self, weight_WX: Float, gpu_X: Integer, speed_G: Float, *, worst: bool = False) -> None:
        self.weight_WX, self.speed_G, self.worst = weight_WX, speed_G / speed_G.sum(), worst
        self.gpu_X = gpu_X.astype(np.int64).copy()
        self.load_WG: Float = np.stack(
            [np.bincount(gpu_X, weights=w, minlength=len(speed_G)).astype(np.float64) for w in weight_WX]
        )

    @property
    def level(self) -> float:
        """Fullest over mean GPU now."""
        return float(self._join((self.load_WG / self.speed_G).max(axis=1)))

    def after_XX(self) -> Float:
        """The level after swapping each two items."""
        return self._join(np.stack([self._after(w) for w in range(len(self.weight_WX))]))

    def swap(self, x: int, y: int) -> None:
        """Exchange the GPUs of two items."""
        g, h = self.gpu_X[x], self.gpu_X[y]
        gain_W = self.weight_WX[:, x] - self.weight_WX[:, y]
        self.load_WG[:, g] -= gain_W
        self.load_WG[:, h] += gain_W
        self.gpu_X[x], self.gpu_X[y] = h, g

    def _after(self, scenario: int) -> Float:
        weight_X, load_G = self.weight_WX[scenario], self.load_WG[scenario]
        own_X, speed_X = load_G[self.gpu_X], self.speed_G[self.gpu_X]
        gain_XX = weight_X[:, None] - weight_X
        side_XX = (own_X[:, None] - gain_XX) / speed_X[:, None]
        after_XX = np.maximum(side_XX, side_XX.T)
        rest_GG = _max_of_others(load_G / self.speed_G)
        return np.maximum(after_XX, rest_GG[self.gpu_X[:, None], self.gpu_X])

    def _join(self, value: Float) -> Float:
        return np.asarray(value.max(axis=0) if self.worst else value.mean(axis=0))


def _max_of_others(level_G: Float) -> Float:
    """[G, G]: the fullest GPU other than g and h (for g = h: other than g)."""
    G = len(level_G)
    rest = np.zeros((G, G))
    top = np.argsort(-level_G)[:3]
    for g in reversed(top.tolist()):
        free = np.ones(G, bool)
        free[g] = False
        rest[np.ix_(free, free)] = level_G[g]
    return rest
