"""Cross-layer hops: given the layers before and after, one layer is a transport problem; alternate over layers.

With neighbours fixed, an item on GPU g keeps the tokens whose previous or next first choice is there too: a cost per
item and GPU. The exact transport gives the start, swaps with the load term finish it. Annealing comes first.
Shapes: L layers, X items (slots), G GPUs, E experts.
"""

import time
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from .affinity_search import layer_task
from .budget import Budget
from .hops_annealing import ChainAnnealing
from .objectives import PartWeights
from .objectives.hops import first_choice_TL
from .problem import Problem
from .tabu import LayerTask, SearchState, tabu_search

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
ROUNDS = 25
SWEEPS = 4
STEPS = 36_000


def search_hops(
    problem: Problem,
    start_LP: Integer,
    budget: Budget,
    weights: PartWeights,
    *,
    restarts: int,
) -> Integer:
    """Improve a map for hops * hop share + fan * GPU fan-out + node * node fan-out + level * imbalance.

    Args:
        problem: has tokens.
        start_LP: a map to start from; its copy counts are kept.
        budget: time, seed; told of progress.
        weights: of the objective, without churn and goal.
        restarts: annealings, each from a random start.
    """
    tasks = [
        layer_task(problem, start_LP[layer], layer, weights, seed=budget.seed) for layer in range(problem.num_layers)
    ]
    chain = _Chain(problem, tasks, weights.hops, budget)
    known = [np.arange(problem.num_slots) // problem.slots_per_gpu for _ in tasks]
    best, best_cost = known, chain.cost(known)
    has_copies = problem.num_slots > problem.num_experts
    for restart in range(1 if has_copies else restarts):
        budget.tell("searching hops", restart / restarts)
        share_s = 0.85 * budget.left_s / (restarts - restart)
        cooled = known if has_copies else chain.anneal(weights.level, seed=budget.seed + restart, seconds=share_s)
        found, cost = chain.descend(cooled, np.random.default_rng(budget.seed + restart))
        if cost < best_cost:
            best, best_cost = found, cost
            budget.offer(_maps(tasks, best))
        if budget.left_s == 0:
            break
    return _maps(tasks, best)


def _maps(tasks: list[LayerTask], gpus: list[Integer]) -> Integer:
    return np.stack([task.expert_X[np.argsort(gpu_X, kind="stable")] for task, gpu_X in zip(tasks, gpus, strict=True)])


class _Chain:
    """All layers, and pair_XX[l]: the share of tokens that go from each item of layer l to each of layer l + 1."""

    def __init__(self, problem: Problem, tasks: list[LayerTask], hops: float, budget: Budget) -> None:
        self.tasks, self.budget, self.G = tasks, budget, problem.num_gpus
        self.weight = hops * len(tasks) / max(len(tasks) - 1, 1)
        pairs = [pair_shares(problem, layer) for layer in range(len(tasks) - 1)]
        self.pair_XX = [
            _per_item(pair, tasks[layer].expert_X, tasks[layer + 1].expert_X) for layer, pair in enumerate(pairs)
        ]

    def cost(self, gpus: list[Integer]) -> float:
        own = sum(SearchState(task, gpu_X).cost for task, gpu_X in zip(self.tasks, gpus, strict=True))
        return own - self.weight * sum(self._stay(layer, gpus) for layer in range(len(self.pair_XX)))

    def anneal(self, level: float, *, seed: int, seconds: float) -> list[Integer]:
        """Cool down from a random start; for one copy per expert."""
        X = len(self.tasks[0].expert_X)
        random = np.random.default_rng(seed)
        start_LX = np.stack([random.permutation(np.arange(X) * self.G // X) for _ in self.tasks])
        annealing = ChainAnnealing(
            self.weight * np.array(self.pair_XX).reshape(-1, X, X),
            np.stack([task.weight_WX for task in self.tasks]),
            self.tasks[0].speed_G,
            level,
            start_LX,
            seed,
        )
        return list(annealing.run(STEPS, time.monotonic() + seconds))

    def descend(self, gpus: list[Integer], random: np.random.Generator) -> tuple[list[Integer], float]:
        gpus, cost = list(gpus), self.cost(gpus)
        for _ in range(SWEEPS):
            for layer in random.permutation(len(self.tasks)).tolist():
                if self.budget.left_s == 0:
                    return gpus, self.cost(gpus)
                gpus[layer] = self._best_layer(layer, gpus)
            after = self.cost(gpus)
            if after >= cost - 1e-6:
                break
            cost = after
        return gpus, self.cost(gpus)

    def _best_layer(self, layer: int, gpus: list[Integer]) -> Integer:
        linear_XG = np.zeros((len(gpus[layer]), self.G))
        if layer > 0:
            linear_XG -= self.weight * self.pair_XX[layer - 1].T @ _members(gpus[layer - 1], self.G)
        if layer < len(self.pair_XX):
            linear_XG -= self.weight * self.pair_XX[layer] @ _members(gpus[layer + 1], self.G)
        task = replace(self.tasks[layer], linear_XG=linear_XG)
        deadline = time.monotonic() + self.budget.left_s
        found = [tabu_search(task, gpus[layer], rounds=ROUNDS, deadline=deadline)]
        moved_X = _transport(linear_XG)
        if len(np.unique(task.expert_X)) == len(task.expert_X):
            found.append(tabu_search(task, moved_X, rounds=ROUNDS, deadline=deadline))
        return min(found, key=lambda pair: pair[1])[0]

    def _stay(self, layer: int, gpus: list[Integer]) -> float:
        return float(self.pair_XX[layer][gpus[layer][:, None] == gpus[layer + 1]].sum())


def _members(gpu_X: Integer, gpus: int) -> Float:
    return (gpu_X[:, None] == np.arange(gpus)).astype(np.float64)


def _transport(linear_XG: Float) -> Integer:
    """Exact assignment of items to GPUs for a linear cost."""
    X, G = linear_XG.shape
    column_G = np.repeat(np.arange(G), X // G)
    _, column = linear_sum_assignment(linear_XG[:, column_G])
    return np.asarray(column_G[column])


def pair_shares(problem: Problem, layer: int) -> Float:
    """Share of tokens whose first choice is e at `layer` and f at the next, mean over scenarios."""
    E = problem.num_experts
    total = np.zeros((E, E))
    for scenario in problem.scenarios:
        assert scenario.trace is not None
        choice_TL = first_choice_TL(scenario.trace, slice(layer, layer + 2))
        keep = (choice_TL >= 0).all(axis=1)
        flat = choice_TL[keep, 0] * E + choice_TL[keep, 1]
        total += np.bincount(flat, minlength=E * E).reshape(E, E) / max(int(keep.sum()), 1)
    return total / len(problem.scenarios)


def _per_item(pair_EE: Float, here_X: Integer, there_X: Integer) -> Float:
    """Traffic between items: copies share an expert's tokens evenly."""
    E = len(pair_EE)
    here_E, there_E = (np.maximum(np.bincount(items, minlength=E), 1) for items in (here_X, there_X))
    return np.asarray((pair_EE / here_E[:, None] / there_E)[np.ix_(here_X, there_X)])
