"""One layer at any size: transport starts and tabu search; large layers by nodes, then inside nodes, then whole.

Shapes: W scenarios, X items, G GPUs, M nodes.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..data.bundles import Bundles
from .tabu import LayerTask, SearchState, tabu_search
from .transport import transport_starts

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
WHOLE_ITEMS = 64
LARGE_ROUNDS = 70
FORBIDDEN = -1e12
NODE_TIME = 0.4


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How hard to try.

    Args:
        starts: runs of the alternating transport.
        keep: starts that the tabu search takes up.
        rounds: swaps of each tabu search.
        polish: swaps of the search over a whole large layer.
        bundles: at most this many bundles of a large layer, the most frequent ones, guide its search.
    """

    starts: int = 40
    keep: int = 3
    rounds: int = 250
    polish: int = 70
    bundles: int = 4000


def search_layer(
    task: LayerTask, known_X: Integer, effort: Effort, seed: int, deadline: float
) -> tuple[Integer, float]:
    """Best GPU of each item found, and its cost; never worse than `known_X`.

    Args:
        task: the layer.
        known_X: a feasible assignment of items to GPUs.
        effort: how hard to try.
        seed: of all random choices.
        deadline: `time.monotonic()` at which to stop.
    """
    if len(known_X) > WHOLE_ITEMS:
        task, effort = _thinned(task, effort), replace(effort, rounds=min(effort.rounds, LARGE_ROUNDS))
    best_X, best = known_X, SearchState(task, known_X).cost
    for found_X in _attempts(task, known_X, effort, seed, deadline):
        cost = SearchState(task, found_X).cost
        if cost < best and is_feasible(task, found_X):
            best_X, best = found_X, cost
        if time.monotonic() > deadline:
            break
    return best_X, best


def is_feasible(task: LayerTask, gpu_X: Integer) -> bool:
    """Equal numbers of items per GPU and no two copies of one expert on one GPU."""
    G = len(task.speed_G)
    is_even = bool((np.bincount(gpu_X, minlength=G) == len(gpu_X) // G).all())
    return is_even and len(np.unique(task.expert_X * G + gpu_X)) == len(gpu_X)


def _attempts(task: LayerTask, known_X: Integer, effort: Effort, seed: int, deadline: float) -> Iterator[Integer]:
    """Results of the searches, one after another: from transport starts and from the known assignment."""
    random = np.random.default_rng(seed)
    if len(known_X) > WHOLE_ITEMS:
        if task.linear_XG is not None or not (task.fan or task.node):
            yield tabu_search(task, known_X, rounds=effort.rounds, seed=seed, deadline=deadline)[0]
        else:
            yield _by_nodes(task, known_X, effort, random, seed, deadline)
        return
    starts = _starts(task, effort, random, deadline) if task.fan or task.node else []
    for index, start_X in enumerate([known_X, *starts]):
        yield tabu_search(task, start_X, rounds=effort.rounds, seed=seed + index, deadline=deadline)[0]


def _starts(task: LayerTask, effort: Effort, random: np.random.Generator, deadline: float) -> list[Integer]:
    """GPU of each item: nodes by transport, then GPUs within each node by transport."""
    items = len(task.expert_X)
    pair_XX = _pairs(task, items)
    weight_X = task.weight_WX.mean(axis=0)
    G, M = len(task.speed_G), int(task.node_G[-1]) + 1
    price = task.level / max(task.fan + task.node, 1e-9) / 10
    if M == 1 or not task.node or not _equal_nodes(task.node_G):
        return transport_starts(
            pair_XX, weight_X, G, starts=effort.starts, keep=effort.keep, price=price, random=random, deadline=deadline
        )
    found = []
    for node_X in transport_starts(
        pair_XX, weight_X, M, starts=effort.starts, keep=effort.keep, price=price, random=random, deadline=deadline
    ):
        gpu_X = np.empty(items, np.int64)
        for node in range(M):
            inside = np.flatnonzero(node_X == node)
            gpu_X[inside] = np.flatnonzero(task.node_G == node)[0] + _inside_start(
                pair_XX, weight_X, inside, G // M, random, deadline
            )
        found.append(gpu_X)
    return found


def _inside_start(
    pair_XX: Float, weight_X: Float, inside: Integer, gpus: int, random: np.random.Generator, deadline: float
) -> Integer:
    weight = weight_X[inside] / max(float(weight_X[inside].sum()), 1e-30)
    pair = pair_XX[np.ix_(inside, inside)]
    return transport_starts(pair, weight, gpus, starts=2, keep=1, price=0.1, random=random, deadline=deadline)[0]


def _pairs(task: LayerTask, items: int) -> Float:
    pair_XX = task.bundles.coactivation(items)
    same = task.expert_X[:, None] == task.expert_X
    np.fill_diagonal(same, False)
    pair_XX[same] = FORBIDDEN
    return pair_XX


def _equal_nodes(node_G: Integer) -> bool:
    counts = np.bincount(node_G)
    return bool(np.all(counts == counts[0]))


def _by_nodes(
    task: LayerTask, known_X: Integer, effort: Effort, random: np.random.Generator, seed: int, deadline: float
) -> Integer:
    """Items to nodes, each node's items to its GPUs, then swaps over the whole layer."""
    gpu_X = known_X
    if int(task.node_G[-1]) > 0 and _equal_nodes(task.node_G):
        gpu_X = _nodes_then_gpus(task, known_X, effort, random, seed, deadline)
    elif task.fan:
        start_X = _starts(task, replace(effort, starts=1, keep=1), random, deadline)[0]
        gpu_X = tabu_search(task, start_X, rounds=effort.rounds, seed=seed, deadline=deadline)[0]
    return tabu_search(task, gpu_X, rounds=effort.polish, seed=seed, deadline=deadline)[0]


def _nodes_then_gpus(
    task: LayerTask, known_X: Integer, effort: Effort, random: np.random.Generator, seed: int, deadline: float
) -> Integer:
    M = int(task.node_G[-1]) + 1
    node_speed_M = np.bincount(task.node_G, weights=task.speed_G).astype(np.float64)
    by_node = replace(
        task,
        speed_G=node_speed_M,
        node_G=np.arange(M),
        fan=task.fan + task.node,
        node=0.0,
        expert_X=task.expert_X
        if len(task.expert_X) == len(np.unique(task.expert_X))
        else np.arange(len(task.expert_X)),
    )
    until = _after(NODE_TIME, deadline)
    start_X = _starts(replace(by_node, expert_X=task.expert_X), replace(effort, starts=1, keep=1), random, until)[0]
    node_X, _ = tabu_search(by_node, start_X, rounds=effort.rounds, seed=seed, deadline=until)
    gpu_X = np.empty(len(known_X), np.int64)
    for node in range(M):
        inside = np.flatnonzero(node_X == node)
        gpus = np.flatnonzero(task.node_G == node)
        until = _after(1 / (M + 1 - node), deadline)
        gpu_X[inside] = gpus[_inside_node(task, inside, gpus, effort, random, seed, until)]
    return gpu_X


def _after(share: float, deadline: float) -> float:
    """When that share of the time left until the deadline will be over."""
    now = time.monotonic()
    return now + share * (deadline - now)


def _inside_node(
    task: LayerTask,
    inside: Integer,
    gpus: Integer,
    effort: Effort,
    random: np.random.Generator,
    seed: int,
    deadline: float,
) -> Integer:
    """GPU, within its node, of each item of one node."""
    part_X = np.full(len(task.expert_X), -1)
    part_X[inside] = np.arange(len(inside))
    local = replace(
        task,
        bundles=task.bundles.project(part_X),
        weight_WX=task.weight_WX[:, inside],
        expert_X=task.expert_X[inside],
        speed_G=task.speed_G[gpus],
        node_G=np.zeros(len(gpus), np.int64),
        fan=task.fan if task.fan else 1e-3,
        node=0.0,
        level=task.level,
    )
    start_X = _starts(local, replace(effort, starts=2, keep=1), random, deadline)[0]
    return tabu_search(local, start_X, rounds=effort.rounds // 3, seed=seed, deadline=deadline)[0]


def _thinned(task: LayerTask, effort: Effort) -> LayerTask:
    """The most frequent bundles and one load instead of folds: what a large layer's search can afford."""
    return replace(
        task,
        bundles=_most_frequent(task.bundles, effort.bundles),
        weight_WX=task.weight_WX if task.worst else task.weight_WX.mean(axis=0, keepdims=True),
    )


def _most_frequent(bundles: Bundles, limit: int) -> Bundles:
    if len(bundles.count_B) <= limit:
        return bundles
    chosen = np.argsort(-bundles.count_B, kind="stable")[:limit]
    return Bundles(bundles.item_BK[chosen], bundles.count_B[chosen])
