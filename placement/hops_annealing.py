"""Annealing of a chain of layers: every second layer at once takes one swap, drawn with probability exp(-change / T).

Given its neighbours a layer's swap changes are exact (see hops_search.py), and layers of equal parity do not touch each
other, so half of all layers move together. Drawing from all swaps and "none" (heat bath) needs no rejections.
Shapes: L layers, A layers of one parity, W folds or scenarios, X items, G GPUs.
"""

import time

import numpy as np
from numpy.typing import NDArray

Single = NDArray[np.float32]
Integer = NDArray[np.int64]
HOT, COLD = 0.03, 0.0004


class ChainAnnealing:
    """State of the annealing.

    Args:
        pair_LXX: [L - 1, X, X] share of tokens from items of a layer to items of the next, times the weight of hops.
        weight_LWX: load of each item, summing to 1 over items.
        speed_G: relative speeds.
        price: cost of one unit of fullest over mean GPU, per layer.
        gpu_LX: GPU of each item at the start.
        seed: of the draws.
    """

    def __init__(
        self,
        pair_LXX: NDArray[np.float64],
        weight_LWX: NDArray[np.float64],
        speed_G: NDArray[np.float64],
        price: float,
        gpu_LX: Integer,
        seed: int,
    ) -> None:
        L, X = gpu_LX.shape
        edge = np.zeros((1, X, X), np.float32)
        self.back_LXX = np.concatenate([edge, pair_LXX.transpose(0, 2, 1).astype(np.float32)])
        self.ahead_LXX = np.concatenate([pair_LXX.astype(np.float32), edge])
        self.weight_LWX, self.price = weight_LWX.astype(np.float32), price
        self.speed_G = (speed_G / speed_G.sum()).astype(np.float32)
        self.gpu_LX, self.G, self.L = gpu_LX.copy(), len(speed_G), L
        self.member_LXG = (gpu_LX[:, :, None] == np.arange(self.G)).astype(np.float32)
        self.random = np.random.default_rng(seed)

    def run(self, steps: int, deadline: float) -> Integer:
        """Cool down over `steps` half-sweeps or until the deadline; returns the GPU of each item."""
        began = time.monotonic()
        for step in range(steps):
            now = time.monotonic()
            if now > deadline:
                break
            progress = max(step / steps, (now - began) / max(deadline - began, 1e-9))
            self._half_sweep(np.arange(step % 2, self.L, 2), HOT * (COLD / HOT) ** progress)
        return self.gpu_LX

    def _half_sweep(self, layers: Integer, temperature: float) -> None:
        change = self._hop_change(layers)
        if self.price:
            change += self.price * self._level_change(layers)
        noise = -np.log(-np.log(self.random.random(change.shape, dtype=np.float32) + 1e-20) + 1e-20)
        X = change.shape[1]
        diagonal = np.arange(X)
        same_gpu = self.gpu_LX[layers][:, :, None] == self.gpu_LX[layers][:, None, :]
        change[same_gpu] = np.inf
        change[:, diagonal, diagonal] = 0
        x, y = np.divmod((change - temperature * noise).reshape(len(layers), -1).argmin(axis=1), X)
        moved = x != y
        self._swap(layers[moved], x[moved], y[moved])

    def _hop_change(self, layers: Integer) -> Single:
        before = self.member_LXG[np.maximum(layers - 1, 0)]
        after = self.member_LXG[np.minimum(layers + 1, self.L - 1)]
        linear_AXG = -(self.back_LXX[layers] @ before) - self.ahead_LXX[layers] @ after
        gpu_AX = self.gpu_LX[layers]
        at_AXX = np.take_along_axis(
            linear_AXG, np.broadcast_to(gpu_AX[:, None, :], (*gpu_AX.shape, gpu_AX.shape[1])), 2
        )
        move = at_AXX - np.diagonal(at_AXX, axis1=1, axis2=2)[:, :, None]
        return np.asarray(move + move.transpose(0, 2, 1))

    def _level_change(self, layers: Integer) -> Single:
        gpu_AX, weight_AWX = self.gpu_LX[layers], self.weight_LWX[layers]
        level_AWG = (weight_AWX @ self.member_LXG[layers]) / self.speed_G
        A, W, X = weight_AWX.shape
        at = np.broadcast_to(gpu_AX[:, None, :], (A, W, X))
        own = np.take_along_axis(level_AWG, at, 2)
        gain = weight_AWX[:, :, :, None] - weight_AWX[:, :, None, :]
        side = own[:, :, :, None] - gain / self.speed_G[gpu_AX][:, None, :, None]
        highest = np.maximum(side, side.transpose(0, 1, 3, 2))
        rest = _max_of_others(level_AWG)
        flat = (gpu_AX[:, :, None] * self.G + gpu_AX[:, None, :]).reshape(A, 1, X * X)
        rest = np.take_along_axis(rest.reshape(A, W, -1), np.broadcast_to(flat, (A, W, X * X)), 2).reshape(A, W, X, X)
        return np.asarray(np.maximum(highest, rest).mean(axis=1) - level_AWG.max(axis=2).mean(axis=1)[:, None, None])

    def _swap(self, layers: Integer, x: Integer, y: Integer) -> None:
        g, h = self.gpu_LX[layers, x], self.gpu_LX[layers, y]
        self.gpu_LX[layers, x], self.gpu_LX[layers, y] = h, g
        for item, old, new in ((x, g, h), (y, h, g)):
            self.member_LXG[layers, item, old] = 0
            self.member_LXG[layers, item, new] = 1


def _max_of_others(level_AWG: Single) -> Single:
    """[A, W, G, G]: the fullest GPU other than g and h."""
    A, W, G = level_AWG.shape
    top = np.argsort(-level_AWG, axis=2)[:, :, : min(3, G)]
    value = np.take_along_axis(level_AWG, top, 2)
    rest = np.zeros((A, W, G, G), np.float32)
    gpu = np.arange(G)
    for rank in reversed(range(top.shape[2])):
        free = gpu != top[:, :, rank, None]
        both_free = free[:, :, :, None] & free[:, :, None, :]
        rest = np.where(both_free, value[:, :, rank, None, None], rest)
    return rest
