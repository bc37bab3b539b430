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
WHOLE_ITEMS = 64  # slots of a layer that is searched as a whole from many starts: time grows with their square
LARGE_ROUNDS = 70  # swaps at most of each tabu search of a larger layer, for the same reason. Untried elsewhere
FORBIDDEN = -1e12  # co-activation of two copies of one expert: no transport puts them together
NODE_TIME = 0.4  # share of the time for dealing items to nodes before each node is searched. Untried elsewhere


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


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """How one layer is tried: what every step of its search shares.

    Args:
        effort: starts, swaps and sizes.
        seed: of the tabu searches' tenures, each from a fresh generator.
        random: of the starts; steps draw from it one after another.
        deadline: `time.monotonic()` at which to stop.
    """

    effort: Effort
    seed: int
    random: np.random.Generator
    deadline: float

    def until(self, share: float) -> "Attempt":
        """The same until that share of the time left is over."""
        now = time.monotonic()
        return replace(self, deadline=now + share * (self.deadline - now))

    def with_starts(self, starts: int) -> "Attempt":
        """The same with that many transports, of which the best one is kept."""
        return replace(self, effort=replace(self.effort, starts=starts, keep=1))

    def tabu(self, task: LayerTask, start_X: Integer, rounds: int) -> Integer:
        """The best assignment that a tabu search of that many swaps sees."""
        return tabu_search(task, start_X, rounds=rounds, seed=self.seed, deadline=self.deadline)[0]


def search_layer(
    task: LayerTask, known_X: Integer, effort: Effort, seed: int, deadline: float
) -> tuple[Integer, float]:
    """Best GPU of each item found, and its cost; never worse than `known_X`.

    Args:
        task: token sets, loads and weights of the layer.
        known_X: a feasible assignment of items to GPUs.
        effort: how hard to try.
        seed: of all random choices.
        deadline: `time.monotonic()` at which to stop.
    """
    if len(known_X) > WHOLE_ITEMS:
        task, effort = _thinned(task, effort), replace(effort, rounds=min(effort.rounds, LARGE_ROUNDS))
    attempt = Attempt(effort=effort, seed=seed, random=np.random.default_rng(seed), deadline=deadline)
    best_X, best = known_X, SearchState(task, known_X).cost
    for found_X in _tries(task, known_X, attempt):
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


def _tries(task: LayerTask, known_X: Integer, attempt: Attempt) -> Iterator[Integer]:
    """Results of the searches, one after another: from transport starts and from the known assignment."""
    has_sets = bool(task.fan or task.node)
    if len(known_X) > WHOLE_ITEMS:
        if task.linear_XG is not None or not has_sets:
            yield attempt.tabu(task, known_X, attempt.effort.rounds)
        else:
            yield _by_nodes(task, known_X, attempt)
        return
    starts = _starts(task, attempt) if has_sets else []
    for index, start_X in enumerate([known_X, *starts]):
        yield replace(attempt, seed=attempt.seed + index).tabu(task, start_X, attempt.effort.rounds)


def _starts(task: LayerTask, attempt: Attempt) -> list[Integer]:
    """GPU of each item: nodes by transport, then GPUs within each node by transport."""
    items = len(task.expert_X)
    pair_XX = _pairs(task, items)
    weight_X = task.weight_WX.mean(axis=0)
    G, M = len(task.speed_G), int(task.node_G[-1]) + 1
    nodes_first = M > 1 and task.node and _equal_nodes(task.node_G)
    parts = transport_starts(
        pair_XX,
        weight_X,
        M if nodes_first else G,
        starts=attempt.effort.starts,
        keep=attempt.effort.keep,
        price=task.level / max(task.fan + task.node, 1e-9) / 10,
        random=attempt.random,
        deadline=attempt.deadline,
    )
    if not nodes_first:
        return parts
    found = []
    for node_X in parts:
        gpu_X = np.empty(items, np.int64)
        for node in range(M):
            inside = np.flatnonzero(node_X == node)
            first = np.flatnonzero(task.node_G == node)[0]
            gpu_X[inside] = first + _inside_start(pair_XX, weight_X, inside, G // M, attempt)
        found.append(gpu_X)
    return found


def _inside_start(pair_XX: Float, weight_X: Float, inside: Integer, gpus: int, attempt: Attempt) -> Integer:
    weight = weight_X[inside] / max(float(weight_X[inside].sum()), 1e-30)
    pair = pair_XX[np.ix_(inside, inside)]
    random, deadline = attempt.random, attempt.deadline
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


def _by_nodes(task: LayerTask, known_X: Integer, attempt: Attempt) -> Integer:
    """Items to nodes, each node's items to its GPUs, then swaps over the whole layer."""
    gpu_X = known_X
    if int(task.node_G[-1]) > 0 and _equal_nodes(task.node_G):
        gpu_X = _nodes_then_gpus(task, known_X, attempt)
    elif task.fan:
        start_X = _starts(task, attempt.with_starts(1))[0]
        gpu_X = attempt.tabu(task, start_X, attempt.effort.rounds)
    return attempt.tabu(task, gpu_X, attempt.effort.polish)


def _nodes_then_gpus(task: LayerTask, known_X: Integer, attempt: Attempt) -> Integer:
    M = int(task.node_G[-1]) + 1
    by_node = replace(
        task,
        speed_G=np.bincount(task.node_G, weights=task.speed_G).astype(np.float64),
        node_G=np.arange(M),
        fan=task.fan + task.node,
        node=0.0,
    )
    first = attempt.until(NODE_TIME)
    start_X = _starts(by_node, first.with_starts(1))[0]
    node_X = first.tabu(_with_copies_free(by_node), start_X, attempt.effort.rounds)
    gpu_X = np.empty(len(known_X), np.int64)
    for node in range(M):
        inside = np.flatnonzero(node_X == node)
        gpus = np.flatnonzero(task.node_G == node)
        gpu_X[inside] = gpus[_inside_node(task, inside, gpus, attempt.until(1 / (M + 1 - node)))]
    return gpu_X


def _with_copies_free(by_node: LayerTask) -> LayerTask:
    """The task without its rule on copies: a node may hold two copies of an expert, on two of its GPUs."""
    has_copies = len(by_node.expert_X) > len(np.unique(by_node.expert_X))
    return replace(by_node, expert_X=np.arange(len(by_node.expert_X))) if has_copies else by_node


def _inside_node(task: LayerTask, inside: Integer, gpus: Integer, attempt: Attempt) -> Integer:
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
        fan=task.fan if task.fan else 1e-3,  # sets still decide between plans of equal level
        node=0.0,
    )
    start_X = _starts(local, attempt.with_starts(2))[0]
    return attempt.tabu(local, start_X, attempt.effort.rounds // 3)


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
