"""Annealing of a chain of layers: every second layer at once takes one swap, drawn with probability exp(-change / T).

Given its neighbours a layer's swap changes are exact (see hops_search.py), and layers of equal parity do not touch each
other, so half of all layers move together. Drawing from all swaps and "none" (heat bath) needs no rejections.
From time to time two GPUs change places in all layers after some layer: single swaps cannot mend two threads of layers
that have crossed. Shapes: L layers, A layers of one parity, W folds or scenarios, X items, G GPUs.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Single = NDArray[np.float32]
Integer = NDArray[np.int64]
# Temperatures in hops per token: hotter starts forget more, colder ends settle more. Untried elsewhere.
HOT, COLD = 0.03, 0.0004
TAIL_EVERY = 20  # half-sweeps between exchanges of tails: time against crossed threads. Untried elsewhere
NOISE = 1 << 21  # numbers drawn once, used from random places on: memory (8 MiB) against drawing anew
SETTLED = 0.4  # share of the cooling after which the price follows the floor: hot plans say little about it
PRICE_RATE = 0.02  # log of the price per half-sweep and missing balancedness: quick against steady. Untried elsewhere


@dataclass(frozen=True, kw_only=True, eq=False)
class ChainTask:
    """A chain of layers to anneal.

    Args:
        pair_LXX: [L - 1, X, X] share of tokens from items of a layer to items of the next, times the weight of hops.
        saved_GG: what staying close saves: 1 on the diagonal, 1 - relative cost of the hop elsewhere.
        weight_LWX: load of each item, summing to 1 over items.
        speed_G: relative speed of each GPU, positive.
        expert_LX: expert of each item; two items of one expert may not share a GPU.
        price: cost of one unit of fullest over mean GPU, per layer, at the start; 0 leaves the load out.
        floor: balancedness that the price is steered to, or None for a constant price.
    """

    pair_LXX: Float
    saved_GG: Float
    weight_LWX: Float
    speed_G: Float
    expert_LX: Integer
    price: float
    floor: float | None = None


class ChainAnnealing:
    """State of the annealing.

    Args:
        task: traffic, loads and prices of the chain.
        gpu_LX: GPU of each item at the start; as many items on every GPU.
        seed: decides all draws.
    """

    def __init__(self, task: ChainTask, gpu_LX: Integer, seed: int) -> None:
        pair_LXX, expert_LX = task.pair_LXX, task.expert_LX
        self.L, self.X = gpu_LX.shape
        self.G = len(task.speed_G)
        edge = np.zeros((1, self.X, self.X), np.float32)
        self.back_LXX = np.concatenate([edge, pair_LXX.transpose(0, 2, 1).astype(np.float32)])
        self.ahead_LXX = np.concatenate([pair_LXX.astype(np.float32), edge])
        self.saved_GG = task.saved_GG.astype(np.float32)
        self.weight_WLX = np.ascontiguousarray(task.weight_LWX.transpose(1, 0, 2), np.float32)
        self.slow_G = (task.speed_G.sum() / task.speed_G).astype(np.float32)
        self.price, self.floor = task.price, task.floor
        self.gpu_LX = gpu_LX.copy()
        self.member_LXG = (gpu_LX[:, :, None] == np.arange(self.G)).astype(np.float32)
        self.random = np.random.default_rng(seed)
        self.gumbel = np.log(np.maximum(self.random.standard_exponential(NOISE, dtype=np.float32), 1e-30))
        is_copy_LXX = expert_LX[:, :, None] == expert_LX[:, None, :]
        is_copy_LXX[:, np.arange(self.X), np.arange(self.X)] = False
        self.copies_LXX = is_copy_LXX.astype(np.float32) if is_copy_LXX.any() else None
        self.gpus_are_alike = bool(np.ptp(task.speed_G) == 0 and np.array_equal(task.saved_GG, np.eye(self.G)))

    def run(self, steps: int, deadline: float) -> Integer:
        """Cool down over `steps` half-sweeps or until the deadline; returns the GPU of each item."""
        began = time.monotonic()
        for step in range(steps):
            now = time.monotonic()
            if now > deadline:
                break
            cooled = max(step / steps, (now - began) / max(deadline - began, 1e-9))
            temperature = HOT * (COLD / HOT) ** cooled
            balancedness = self._half_sweep(slice(step % 2, self.L, 2), temperature)
            if balancedness is not None and self.floor is not None and cooled > SETTLED:
                self.price *= float(np.exp(PRICE_RATE * (self.floor - balancedness)))
            if self.gpus_are_alike and step % TAIL_EVERY == 0:
                self._swap_tails(temperature)
        return self.gpu_LX

    def _half_sweep(self, half: slice, temperature: float) -> float | None:
        """One drawn swap in every layer of one parity; the balancedness before it, if the load has a price."""
        gpu_AX = self.gpu_LX[half]
        if not len(gpu_AX):
            return None
        change, balancedness = self._hop_change(half, gpu_AX), None
        if self.price:
            level_change, balancedness = self._level_change(half, gpu_AX)
            change += self.price * level_change
        change[gpu_AX[:, :, None] == gpu_AX[:, None, :]] = np.inf
        if self.copies_LXX is not None:
            change[self._doubles(half, gpu_AX)] = np.inf
        np.einsum("axx->ax", change)[:] = 0
        start = int(self.random.integers(max(NOISE - change.size, 1)))
        noise = np.resize(self.gumbel[start : start + change.size], change.shape)
        x, y = np.divmod((change / temperature + noise).reshape(len(gpu_AX), -1).argmin(axis=1), self.X)
        moved = np.flatnonzero(x != y)
        self._swap(half.start + 2 * moved, x[moved], y[moved])
        return balancedness

    def _hop_change(self, half: slice, gpu_AX: Integer) -> Single:
        layers = np.arange(self.L)[half]
        before = self.member_LXG[np.maximum(layers - 1, 0)] @ self.saved_GG
        after = self.member_LXG[np.minimum(layers + 1, self.L - 1)] @ self.saved_GG.T
        saved_AXG = self.back_LXX[half] @ before + self.ahead_LXX[half] @ after
        at_AXX = _at(saved_AXG, gpu_AX)
        move = np.einsum("axx->ax", at_AXX)[:, :, None] - at_AXX
        return np.asarray(move + move.transpose(0, 2, 1))

    def _level_change(self, half: slice, gpu_AX: Integer) -> tuple[Single, float]:
        """Change of the fullest GPU by each swap, and the balancedness before any of them; means over folds."""
        slow_AX = self.slow_G[gpu_AX]
        total = np.zeros((*gpu_AX.shape, self.X), np.float32)
        balancedness = 0.0
        for weight_AX in self.weight_WLX[:, half]:
            level_AG = np.einsum("ax,axg->ag", weight_AX, self.member_LXG[half]) * self.slow_G
            own_AX = np.take_along_axis(level_AG, gpu_AX, 1)
            left_AX = own_AX - weight_AX * slow_AX
            own_after_AXX = left_AX[:, :, None] + slow_AX[:, :, None] * weight_AX[:, None, :]
            both_after_AXX = np.maximum(own_after_AXX, own_after_AXX.transpose(0, 2, 1))
            after = np.maximum(both_after_AXX, _fullest_other(level_AG, gpu_AX))
            peak_A = level_AG.max(axis=1)
            total += after - peak_A[:, None, None]
            balancedness += float((1 / np.maximum(peak_A, 1e-9)).mean())
        folds = len(self.weight_WLX)
        return np.asarray(total / folds, np.float32), balancedness / folds

    def _doubles(self, half: slice, gpu_AX: Integer) -> NDArray[np.bool_]:
        """Swaps that would bring an item to a GPU with another copy of its expert."""
        assert self.copies_LXX is not None
        meets_copy_AXX = _at(self.copies_LXX[half] @ self.member_LXG[half], gpu_AX) > 0.5
        return np.asarray(meets_copy_AXX | meets_copy_AXX.transpose(0, 2, 1))

    def _swap(self, layers: Integer, x: Integer, y: Integer) -> None:
        g, h = self.gpu_LX[layers, x], self.gpu_LX[layers, y]
        self.gpu_LX[layers, x], self.gpu_LX[layers, y] = h, g
        for item, old, new in ((x, g, h), (y, h, g)):
            self.member_LXG[layers, item, old] = 0
            self.member_LXG[layers, item, new] = 1

    def _swap_tails(self, temperature: float) -> None:
        """For each pair of layers, by chance, let two GPUs change places in all layers after the first of them."""
        member = self.member_LXG
        stay_GG = member[:-1].transpose(0, 2, 1) @ (self.ahead_LXX[:-1] @ member[1:])
        own = np.einsum("lgg->lg", stay_GG)
        change_GG = own[:, :, None] + own[:, None, :] - stay_GG - stay_GG.transpose(0, 2, 1)
        g, h = np.triu_indices(self.G, 1)
        change = np.concatenate([np.zeros((len(own), 1), np.float32), change_GG[:, g, h] / temperature], axis=1)
        chosen = (change + np.log(self.random.standard_exponential(change.shape) + 1e-30)).argmin(axis=1)
        renamed_G = np.arange(self.G)
        for layer in range(1, self.L):
            if pick := int(chosen[layer - 1]):
                one, other = g[pick - 1], h[pick - 1]
                renamed_G[[one, other]] = renamed_G[[other, one]]
            self.gpu_LX[layer] = renamed_G[self.gpu_LX[layer]]
        self.member_LXG[:] = self.gpu_LX[:, :, None] == np.arange(self.G)


def _at(value_AXG: Single, gpu_AX: Integer) -> Single:
    """[A, X, X]: the value of item x on the GPU of item y."""
    A, X, G = value_AXG.shape
    return np.asarray(value_AXG.ravel()[np.arange(A * X).reshape(A, X, 1) * G + gpu_AX[:, None, :]])


def _fullest_other(level_AG: Single, gpu_AX: Integer) -> Single:
    """[A, X, X]: the fullest GPU other than those of x and y."""
    top = np.argsort(-level_AG, axis=1)[:, :3]
    value = np.take_along_axis(level_AG, top, 1)[:, :, None, None]
    if value.shape[1] < 3:
        value = np.concatenate([value, np.zeros_like(value[:, :1])], axis=1)[:, [0, 1, -1]]
    has_first, has_second = (gpu_AX == top[:, [rank]] for rank in (0, min(1, top.shape[1] - 1)))
    first = has_first[:, :, None] | has_first[:, None, :]
    second = has_second[:, :, None] | has_second[:, None, :]
    return np.asarray(np.where(first, np.where(second, value[:, 2], value[:, 1]), value[:, 0]))
