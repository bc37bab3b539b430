"""Tabu search of one layer: always the best swap that is not forbidden, the best partition seen is kept.

cost = sum of weights * fan-out per token (GPU groups, node groups) + level weight * fullest over mean GPU.
Shapes: W scenarios, X items (experts or copies), G GPUs, M nodes.
"""

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..data.bundles import Bundles
from .groups import GroupState
from .levels import LevelState

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
TENURE_SHARE = 0.15  # of the items: so many swaps a moved one is frozen; cycles against good swaps. Untried elsewhere


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTask:
    """One layer to search.

    Args:
        bundles: token sets over items.
        weight_WX: load of each item per scenario.
        expert_X: expert of each item; two items of one expert may not share a GPU.
        speed_G: relative speeds; X / G items go to each GPU.
        node_G: node of each GPU.
        fan, node, level: weights of the cost.
        goal: level that is good enough; only what is above costs.
        worst: level of the worst scenario instead of the mean.
        linear_XG: further cost of having an item on a GPU, or None.
    """

    bundles: Bundles
    weight_WX: Float
    expert_X: Integer
    speed_G: Float
    node_G: Integer
    fan: float
    node: float
    level: float
    goal: float = 0.0
    worst: bool = False
    linear_XG: Float | None = None


class SearchState:
    """A partition with its cost and the cost of every swap."""

    def __init__(self, task: LayerTask, gpu_X: Integer) -> None:
        self.task = task
        used = task.bundles.incidence(len(gpu_X))
        self.tokens = max(task.bundles.tokens, 1.0)
        self.groups: list[tuple[float, GroupState, Integer]] = []
        G, M = len(task.speed_G), int(task.node_G[-1]) + 1
        if task.fan:
            self.groups.append((task.fan, GroupState(used, task.bundles.count_B, gpu_X, G), np.arange(G)))
        if task.node and M > 1:
            node_X = task.node_G[gpu_X]
            self.groups.append((task.node, GroupState(used, task.bundles.count_B, node_X, M), task.node_G))
        self.level = LevelState(task.weight_WX, gpu_X, task.speed_G, worst=task.worst)
        self.has_copies = len(np.unique(task.expert_X)) < len(task.expert_X)

    @property
    def gpu_X(self) -> Integer:
        """GPU of each item now."""
        return self.level.gpu_X

    @property
    def cost(self) -> float:
        """Weighted fan-out, level above the goal, and linear cost, per token."""
        fanout = sum(weight * state.fanout for weight, state, _ in self.groups) / self.tokens
        linear_XG = self.task.linear_XG
        placed = 0.0 if linear_XG is None else float(linear_XG[np.arange(len(self.gpu_X)), self.gpu_X].sum())
        return fanout + self.task.level * max(self.level.level - self.task.goal, 0.0) + placed

    def change_XX(self) -> Float:
        """Change of the cost by each swap; inf where both are on one GPU or a copy would be doubled."""
        goal = self.task.goal
        above = max(self.level.level - goal, 0.0)
        change_XX = self.task.level * (np.maximum(self.level.after_XX() - goal, 0.0) - above)
        for weight, state, _ in self.groups:
            change_XX += weight / self.tokens * state.change_XX()
        if self.task.linear_XG is not None:
            at_XX = self.task.linear_XG[:, self.gpu_X]
            move_XX = at_XX - np.diagonal(at_XX)[:, None]
            change_XX += move_XX + move_XX.T
        change_XX[self.gpu_X[:, None] == self.gpu_X] = np.inf
        if self.has_copies:
            change_XX[self._doubles_XX()] = np.inf
        return change_XX

    def swap(self, x: int, y: int) -> None:
        """Exchange the GPUs of two items; counts are brought up to date."""
        for _, state, _ in self.groups:
            state.swap(x, y)
        self.level.swap(x, y)

    def _doubles_XX(self) -> NDArray[np.bool_]:
        """x may not go to y's GPU if another copy of its expert is there, unless that copy is y itself."""
        expert_X = self.task.expert_X
        holds = np.zeros((int(expert_X.max()) + 1, len(self.task.speed_G)), bool)
        holds[expert_X, self.gpu_X] = True
        into_XX = holds[expert_X][:, self.gpu_X]
        return into_XX | into_XX.T


def tabu_search(
    task: LayerTask, start_X: Integer, *, rounds: int, seed: int = 0, deadline: float = float("inf")
) -> tuple[Integer, float]:
    """Search from one partition.

    Args:
        task: token sets, loads and weights of the layer.
        start_X: GPU of each item.
        rounds: swaps to make at most, worsening ones included.
        seed: of the random tenure.
        deadline: `time.monotonic()` at which to stop.

    Returns:
        The best partition seen and its cost.
    """
    random = np.random.default_rng(seed)
    state = SearchState(task, start_X)
    best_X, cost = state.gpu_X.copy(), state.cost
    best = cost
    tenure = max(2, int(TENURE_SHARE * len(start_X)))
    free_at_X = np.zeros(len(start_X), np.int64)
    for turn in range(rounds):
        if time.monotonic() > deadline:
            break
        change_XX = state.change_XX()
        frozen_X = free_at_X > turn
        is_tabu_XX = frozen_X[:, None] | frozen_X
        is_tabu_XX &= cost + change_XX >= best - 1e-12
        change_XX[is_tabu_XX] = np.inf
        x, y = divmod(int(change_XX.argmin()), len(start_X))
        if not np.isfinite(change_XX[x, y]):
            break
        cost += float(change_XX[x, y])
        state.swap(x, y)
        free_at_X[[x, y]] = turn + 1 + tenure + random.integers(tenure + 1, size=2)
        if cost < best - 1e-12:
            best, best_X = cost, state.gpu_X.copy()
    return best_X, best
