"""Large neighbourhood search: free two to four GPUs of one layer, place their experts anew by the exact programme.

The rest of the layer stays; what it fixes enters as the least peak. GPUs are freed within one node where nodes count,
so that node fan-out does not change. A neighbourhood is accepted if the exact cost of the whole layer falls.
Shapes: X items (experts or copies), G GPUs, F freed GPUs.
"""

import numpy as np
from numpy.typing import NDArray

from ..contract.problem import Problem
from ..data.bundles import Bundles
from ..objectives import Objective
from ..run.blocks import MAX_ITEMS
from ..run.budget import Budget
from ..search.affinity import churn_costs, layer_task
from ..search.layer import is_feasible
from ..search.tabu import LayerTask, SearchState
from .exact import LayerModel, solve_layer

Integer = NDArray[np.int64]
# Larger neighbourhoods find more and need longer than PROGRAMME_S to be proved. Untried elsewhere.
MOST_FREED = 4
MOST_ITEMS = 12
MOST_BUNDLES = 200  # token sets that guide the programme; the whole layer's exact cost decides
PROGRAMME_S = 1.5


def improve_by_neighbourhoods(
    problem: Problem, start_LP: Integer, objective: Objective, budget: Budget, *, tries: int = 10_000
) -> Integer:
    """Improve a map until the time is up or `tries` neighbourhoods have been solved.

    Args:
        problem: at most 3,072 slots per layer.
        start_LP: a complete map; its copy counts are kept.
        objective: fan-out, balance and churn count; hops are refused.
        budget: time and seed; offered every improvement.
        tries: at most this many programmes.
    """
    weights = objective.weights(problem.cluster)
    if weights.hops:
        raise ValueError("neighbourhoods are of one layer; hops join layers: use --solver search")
    if problem.num_slots > MAX_ITEMS:
        raise ValueError(
            f"neighbourhoods take at most {MAX_ITEMS} slots per layer; got {problem.num_slots}: use search"
        )
    random = np.random.default_rng(budget.seed)
    map_LP = start_LP.copy()
    churn_LXG = churn_costs(problem, start_LP, weights.churn)
    states: dict[int, SearchState] = {}
    for turn in range(tries):
        if budget.left_s == 0 or problem.num_gpus == 1:
            break
        layer = turn % problem.num_layers
        if layer not in states:
            linear_XG = None if churn_LXG is None else churn_LXG[layer]
            task = layer_task(problem, start_LP[layer], layer, weights, seed=budget.seed, linear_XG=linear_XG)
            states[layer] = SearchState(task, np.arange(problem.num_slots) // problem.slots_per_gpu)
        gpu_X = _better(states[layer], random, min(PROGRAMME_S, budget.left_s))
        if gpu_X is not None:
            states[layer] = SearchState(states[layer].task, gpu_X)
            map_LP[layer] = start_LP[layer][np.argsort(gpu_X, kind="stable")]
            budget.offer(map_LP)
        budget.tell("solving neighbourhoods", 1 - budget.left_s / budget.time_limit_s)
    return map_LP


def _better(state: SearchState, random: np.random.Generator, time_limit_s: float) -> Integer | None:
    """GPU of each item after one neighbourhood, if that is better."""
    task, gpu_X = state.task, state.gpu_X
    freed_F = _freed(task, len(gpu_X), random)
    inside = np.flatnonzero(np.isin(gpu_X, freed_F))
    inside = inside[np.argsort(gpu_X[inside], kind="stable")]
    start_P = np.arange(len(inside))
    found_P, _ = solve_layer(_model(state, freed_F, inside), time_limit_s=time_limit_s, start_P=start_P)
    if found_P is None:
        return None
    moved_X = gpu_X.copy()
    moved_X[inside[found_P]] = np.repeat(freed_F, len(inside) // len(freed_F))
    is_better = SearchState(task, moved_X).cost < state.cost - 1e-9
    return moved_X if is_better and is_feasible(task, moved_X) else None


def _freed(task: LayerTask, items: int, random: np.random.Generator) -> Integer:
    """Two to four GPUs with few enough items; of one node where nodes count and it has two."""
    gpus = len(task.speed_G)
    most = max(2, min(MOST_FREED, MOST_ITEMS // max(items // gpus, 1)))
    pool = np.arange(gpus)
    if task.node:
        pool = np.flatnonzero(task.node_G == task.node_G[random.integers(gpus)])
        pool = pool if len(pool) > 1 else np.arange(gpus)
    count = min(int(random.integers(2, most + 1)), len(pool))
    return np.sort(random.choice(pool, count, replace=False))


def _model(state: SearchState, freed_F: Integer, inside: Integer) -> LayerModel:
    task = state.task
    part_X = np.full(len(state.gpu_X), -1)
    part_X[inside] = np.arange(len(inside))
    share = float(task.speed_G[freed_F].sum() / task.speed_G.sum())
    fixed_WG = np.delete(state.level.load_WG / state.level.speed_G, freed_F, axis=1)
    return LayerModel(
        weight_WE=task.weight_WX[:, inside] / share,
        speed_G=task.speed_G[freed_F],
        node_G=np.zeros(len(freed_F), np.int64),
        slots_per_gpu=len(inside) // len(freed_F),
        level=task.level,
        least_peak=max(float(fixed_WG.max(initial=0.0)), task.goal),
        bundles=_most_frequent(task.bundles.project(part_X)) if task.fan else None,
        fan=task.fan,
    )


def _most_frequent(bundles: Bundles) -> Bundles:
    """What guides the programme; the whole layer's cost decides afterwards."""
    split = bundles.size_B > 1
    items, count = bundles.item_BK[split], bundles.count_B[split]
    chosen = np.argsort(-count, kind="stable")[:MOST_BUNDLES]
    # shares of all tokens, so that fan-out and level keep their ratio
    rest = np.full((1, items.shape[1]), -1)
    return Bundles(
        np.concatenate([items[chosen], rest]), np.append(count[chosen], bundles.tokens - count[chosen].sum())
    )
