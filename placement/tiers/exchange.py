"""Local search over homes: moves and swaps inside layers, and exchanges of memory between two layers.

Every move changes the seconds of one or two layers by an exact amount and keeps every memory within its capacity:
  move     an expert takes another way, into room that is there;
  swap     two experts of a layer exchange their ways;
  trade    an expert of one layer goes from pool a to pool b, one of another layer from b to a.
Equal seconds are ranked by a small part of the squared chain loads, which levels chains that are not the largest.

Shapes: W scenarios, L layers, E experts, Y ways, H chains, U memory pools, N candidate experts.
"""

import time

import numpy as np
from numpy.typing import NDArray

from .model import TierModel

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
LEVELLING = 1e-3  # of the squared loads over their sum: enough to break ties. Untried elsewhere
LEAST_GAIN = 1e-9  # relative; below it a gain is rounding and moves could go in a circle
SLACK = 1 + 1e-12  # of a capacity, for sums of bytes that are rounded
MOST_HOT = 24  # experts of the largest chains that a round of swaps looks at; more were not faster
KICKED = 3  # experts of one layer that a kick moves at random. Untried elsewhere


class TierSearch:
    """Homes of all experts with the loads that follow from them; `descend` and `kick` improve them."""

    def __init__(self, model: TierModel, way_LE: Integer, seed: int = 0) -> None:
        self.model, self.way_LE = model, way_LE.copy()
        self.random = np.random.default_rng(seed)
        self.load_LWH = model.load_LWH(self.way_LE)
        self.left_U = model.ways.capacity_U * SLACK - model.used_U(self.way_LE)
        self.cost_of: dict[int, Float] = {}
        self.cost_L = np.array([self._score(load_WH) for load_WH in self.load_LWH])

    @property
    def seconds(self) -> float:
        """The objective of the homes as they are."""
        return float(self.model.layer_seconds(self.load_LWH).sum())

    def descend(self, deadline: float) -> None:
        """Improve until no move helps, or until `time.monotonic()` is at the deadline."""
        layers = list(range(self.model.shape[0]))
        while time.monotonic() < deadline:
            for layer in layers:
                while time.monotonic() < deadline and (self._move(layer) or self._swap(layer)):
                    pass
            if not self._trade(deadline):
                return

    def kick(self, deadline: float) -> bool:
        """Swap some experts of a random layer, descend there, keep it if it is better; returns whether it was."""
        layer = int(self.random.integers(self.model.shape[0]))
        real = int(self.model.experts_L[layer])
        before = self.way_LE[layer].copy(), self.load_LWH[layer].copy(), self.left_U.copy(), float(self.cost_L[layer])
        for _ in range(KICKED):
            one, other = self.random.integers(real, size=2)
            self._set(layer, {int(one): int(self.way_LE[layer, other]), int(other): int(self.way_LE[layer, one])})
        while time.monotonic() < deadline and (self._move(layer) or self._swap(layer)):
            pass
        if self.cost_L[layer] < before[3] * (1 - LEAST_GAIN):
            return True
        self.way_LE[layer], self.load_LWH[layer], self.left_U, self.cost_L[layer] = before
        return False

    def _score(self, load_WH: Float) -> Float:
        """Seconds of a layer, ties ranked by squared loads; leading axes are kept."""
        seconds = self.model.layer_seconds(load_WH)
        square = (load_WH**2).sum(axis=(-2, -1)) / np.maximum(load_WH.sum(axis=(-2, -1)), 1e-300)
        return np.asarray(seconds + LEVELLING * square)

    def _costs(self, layer: int) -> Float:
        """[E, Y, W, H] of a layer; the last one used is kept."""
        if layer not in self.cost_of:
            cost_WEYH = self.model.chain_costs_WEYH(layer)[:, : int(self.model.experts_L[layer])]
            self.cost_of = {layer: np.ascontiguousarray(cost_WEYH.transpose(1, 2, 0, 3))}
        return self.cost_of[layer]

    def _set(self, layer: int, ways: dict[int, int]) -> None:
        cost_EYWH, pool_Y = self._costs(layer), self.model.ways.pool_Y
        for expert, way in ways.items():
            old = int(self.way_LE[layer, expert])
            self.load_LWH[layer] += cost_EYWH[expert, way] - cost_EYWH[expert, old]
            self.left_U[pool_Y[old]] += self.model.bytes_L[layer]
            self.left_U[pool_Y[way]] -= self.model.bytes_L[layer]
            self.way_LE[layer, expert] = way
        self.cost_L[layer] = float(self._score(self.load_LWH[layer]))

    def _hot(self, layer: int) -> Integer:
        """Experts that add to the largest chain of a group, most first."""
        cost_EYWH = self._costs(layer)
        own_EWH = cost_EYWH[np.arange(len(cost_EYWH)), self.way_LE[layer, : len(cost_EYWH)]]
        group_H = self.model.ways.group_H
        part_E = np.zeros(len(own_EWH))
        for w in range(own_EWH.shape[1]):
            for group in np.unique(group_H):
                mine = np.flatnonzero(group_H == group)
                part_E += own_EWH[:, w, mine[self.load_LWH[layer, w, mine].argmax()]]
        hot = np.flatnonzero(part_E > 0)
        return hot[np.argsort(-part_E[hot], kind="stable")][:MOST_HOT]

    def _move(self, layer: int) -> bool:
        """The best move of a hot expert into room that is there."""
        cost_EYWH, hot_N = self._costs(layer), self._hot(layer)
        own_NY = self.model.ways.pool_Y == self.model.ways.pool_Y[self.way_LE[layer, hot_N]][:, None]
        fits_NY = (self.left_U[self.model.ways.pool_Y] >= self.model.bytes_L[layer]) | own_NY
        after_NY = np.where(fits_NY, self._after_moves(layer, hot_N), np.inf)
        if not after_NY.size or after_NY.min() >= self.cost_L[layer] * (1 - LEAST_GAIN):
            return False
        n, way = np.unravel_index(int(after_NY.argmin()), after_NY.shape)
        self._set(layer, {int(hot_N[n]): int(way)})
        return bool(len(cost_EYWH))

    def _after_moves(self, layer: int, expert_N: Integer) -> Float:
        cost_EYWH = self._costs(layer)
        own_NWH = cost_EYWH[expert_N, self.way_LE[layer, expert_N]]
        return self._score((self.load_LWH[layer] - own_NWH)[:, None] + cost_EYWH[expert_N])

    def _swap(self, layer: int) -> bool:
        """The best swap of a hot expert's way with another expert's."""
        cost_EYWH, hot_N = self._costs(layer), self._hot(layer)
        way_E = self.way_LE[layer, : len(cost_EYWH)]
        own_EWH = cost_EYWH[np.arange(len(cost_EYWH)), way_E]
        base_NEWH = self.load_LWH[layer] - own_EWH[hot_N][:, None] - own_EWH[None]
        after_NE = self._score(base_NEWH + cost_EYWH[hot_N][:, way_E] + cost_EYWH[:, way_E[hot_N]].swapaxes(0, 1))
        after_NE[way_E[hot_N][:, None] == way_E[None]] = np.inf
        if not after_NE.size or after_NE.min() >= self.cost_L[layer] * (1 - LEAST_GAIN):
            return False
        n, other = np.unravel_index(int(after_NE.argmin()), after_NE.shape)
        one = int(hot_N[n])
        self._set(layer, {one: int(way_E[other]), int(other): int(way_E[one])})
        return True

    def _best_LUU(self, layers: Integer, best_LUU: Float, move_LUU: Integer) -> None:
        """Least change of each layer's cost for taking one expert from a pool to another, and which move that is."""
        pool_Y = self.model.ways.pool_Y
        pools = len(self.left_U)
        for layer in layers.tolist():
            real = int(self.model.experts_L[layer])
            change_EY = self._after_moves(layer, np.arange(real)) - self.cost_L[layer]
            from_E = pool_Y[self.way_LE[layer, :real]]
            order = np.argsort(-change_EY, axis=None, kind="stable")
            expert, way = np.divmod(order, change_EY.shape[1])
            best_LUU[layer] = np.inf
            best_LUU[layer, from_E[expert], pool_Y[way]] = change_EY.ravel()[order]
            move_LUU[layer, from_E[expert], pool_Y[way]] = order
            best_LUU[layer, np.arange(pools), np.arange(pools)] = np.inf

    def _trade(self, deadline: float) -> bool:
        """Trades of memory between layers, best first, until none helps; returns whether any did."""
        L, U = self.model.shape[0], len(self.left_U)
        best_LUU, move_LUU = np.full((L, U, U), np.inf), np.zeros((L, U, U), np.int64)
        self._best_LUU(np.arange(L), best_LUU, move_LUU)
        same_bytes = bool(np.all(self.model.bytes_L == self.model.bytes_L[0]))
        found = False
        while time.monotonic() < deadline and L > 1 and same_bytes:
            order_LUU = np.argsort(best_LUU, axis=0)[:2]
            value = np.take_along_axis(best_LUU, order_LUU, axis=0)
            there, back = (
                (value[:, None], order_LUU[:, None]),
                (value.swapaxes(1, 2)[None], order_LUU.swapaxes(1, 2)[None]),
            )
            total = np.where(there[1] == back[1], np.inf, there[0] + back[0])
            if not total.min() < -LEAST_GAIN * self.cost_L.sum():
                break
            i, j, a, b = np.unravel_index(int(total.argmin()), total.shape)
            changed = np.array([order_LUU[i, a, b], order_LUU[j, b, a]])
            for layer, move in ((changed[0], move_LUU[changed[0], a, b]), (changed[1], move_LUU[changed[1], b, a])):
                expert, way = divmod(int(move), self.model.shape[2])
                self._set(int(layer), {expert: way})
            self._best_LUU(changed, best_LUU, move_LUU)
            found = True
        return found
