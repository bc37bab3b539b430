"""Cross-layer hops: anneal the chain of layers several times, then finish the best layer by layer.

With neighbours fixed, an item on GPU g saves the tokens whose previous or next first choice is close: a saving per item
and GPU. The exact transport for it and swaps with the load term finish a layer. A balance floor is kept by a price of
imbalance that follows it. Shapes: L layers, X items (slots), G GPUs, E experts, W folds or scenarios.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...contract.problem import Problem
from ...objectives import PartWeights
from ...objectives.hops import first_choice_TL, hop_cost_GG
from ...run.budget import Budget
from ...run.workers import in_workers
from ..affinity import layer_task
from ..tabu import LayerTask, SearchState, tabu_search
from .annealing import ChainAnnealing, ChainTask

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
# All trade time against quality. What they reach is recorded (experiments/records/2026-11-21_placement-goals), other
# values are not: untried elsewhere.
DESCENT_ROUNDS = 25  # tabu swaps of one layer given its neighbours
DESCENT_SWEEPS = 4  # over all layers; it ends before if nothing falls
RESTARTS = 8  # annealings from different starts, of which the best one is kept
STEPS_PER_ITEM = 12.5  # half-sweeps per layer and item; more of them help less than another restart
CELL_S = 1e-8  # a half-sweep's time per layer of one parity, pair of items, and fold
ANNEALING_SHARE = 0.8  # of the time left; the descent after it needs the rest
HOPS_FOLDS = 4  # loads that an annealing bears, each with a table of all swaps; the fan-out search bears 8
START_PRICE = 0.23  # of imbalance, which follows the floor from there; HOP_IMBALANCE_PRICE of the objective
MIN_PARALLEL_CELLS = 50_000_000  # half-sweeps x layers x pairs of items that pay for starting processes
FLOOR_ROUNDS = 4  # descents at rising prices until the floor is kept; four raise the price to 2.4 times
FLOOR_STEP = 1.25  # factor of the price between them: a smaller one needs more descents, a larger one overshoots


def search_hops(
    problem: Problem, start_LP: Integer, budget: Budget, weights: PartWeights, *, floor: float | None
) -> Integer:
    """Improve a map for hops * hop cost + fan * GPU fan-out + node * node fan-out + level * imbalance.

    Args:
        problem: every scenario has its trace.
        start_LP: a map to start from; its copy counts are kept.
        budget: time, seed, processes; told of progress.
        weights: of the objective, without churn and goal.
        floor: balancedness to keep, mean over folds; the price of imbalance follows it. None keeps `weights.level`.
    """
    if floor is not None:
        weights = replace(weights, level=weights.level or START_PRICE * weights.hops)
    tasks = [
        _with_merged_folds(layer_task(problem, start_LP[layer], layer, weights, seed=budget.seed))
        for layer in range(problem.num_layers)
    ]
    chain = _Chain(problem, tasks, weights.hops, budget)
    known = [np.arange(problem.num_slots) // problem.slots_per_gpu for _ in tasks]
    results = []
    for found, price in chain.annealed(weights.level, floor):
        results.append((found, price))
        budget.offer(_maps(tasks, found))
        budget.tell("searching hops", len(results) / (RESTARTS + 1))
    if floor is not None and results:
        chain.set_price(float(np.median([price for _, price in results])))
    best = min([known, *(found for found, _ in results)], key=chain.cost)
    for _ in range(FLOOR_ROUNDS):
        best = chain.descend(best, np.random.default_rng(budget.seed))
        if floor is None or chain.balancedness(best) >= floor:
            break
        chain.set_price(chain.tasks[0].level * FLOOR_STEP)
    return _maps(tasks, best)


def _maps(tasks: list[LayerTask], gpus: list[Integer]) -> Integer:
    return np.stack([task.expert_X[np.argsort(gpu_X, kind="stable")] for task, gpu_X in zip(tasks, gpus, strict=True)])


class _Chain:
    """All layers, and pair_XX[l]: the share of tokens that go from each item of layer l to each of layer l + 1."""

    def __init__(self, problem: Problem, tasks: list[LayerTask], hops: float, budget: Budget) -> None:
        self.tasks, self.budget, self.G = tasks, budget, problem.num_gpus
        self.weight = hops * len(tasks) / max(len(tasks) - 1, 1)
        self.saved_GG = 1 - hop_cost_GG(problem.cluster)
        pairs = [pair_shares(problem, layer) for layer in range(len(tasks) - 1)]
        self.pair_XX = [
            _per_item(pair, tasks[layer].expert_X, tasks[layer + 1].expert_X) for layer, pair in enumerate(pairs)
        ]

    def set_price(self, price: float) -> None:
        """Another price of imbalance, for all layers."""
        self.tasks = [replace(task, level=price) for task in self.tasks]

    def balancedness(self, gpus: list[Integer]) -> float:
        """Mean over layers of mean / fullest GPU."""
        levels = [SearchState(replace(t, fan=0, node=0), g).level.level for t, g in zip(self.tasks, gpus, strict=True)]
        return float(np.mean([1 / level if level else 1.0 for level in levels]))

    def cost(self, gpus: list[Integer]) -> float:
        """Own costs of the layers minus what hops are saved."""
        own = sum(SearchState(task, gpu_X).cost for task, gpu_X in zip(self.tasks, gpus, strict=True))
        return own - self.weight * sum(self._saved(layer, gpus) for layer in range(len(self.pair_XX)))

    def annealed(self, price: float, floor: float | None) -> Iterator[tuple[list[Integer], float]]:
        """Annealings from different starts, in all processes; none where one would not cool in time."""
        L, X = len(self.tasks), len(self.tasks[0].expert_X)
        steps = int(STEPS_PER_ITEM * X * L)
        seconds = ANNEALING_SHARE * self.budget.left_s
        folds = np.stack([task.weight_WX for task in self.tasks])
        if steps * CELL_S * -(-L // 2) * X * X * (1 + folds.shape[1]) > seconds or L == 1:
            return
        task = ChainTask(
            pair_LXX=self.weight * np.array(self.pair_XX),
            saved_GG=self.saved_GG,
            weight_LWX=folds,
            speed_G=self.tasks[0].speed_G,
            expert_LX=np.stack([task.expert_X for task in self.tasks]),
            price=price,
            floor=floor,
        )
        jobs = (
            _AnnealingJob(
                task=task,
                seed=self.budget.seed * RESTARTS + restart,
                steps=steps,
                deadline=time.monotonic() + seconds,
            )
            for restart in range(RESTARTS)
        )
        pays = steps * L * X * X > MIN_PARALLEL_CELLS
        for gpu_LX, paid in in_workers(_anneal, jobs, self.budget.processes if pays else 1):
            yield list(gpu_LX), paid

    def descend(self, gpus: list[Integer], random: np.random.Generator) -> list[Integer]:
        """Every layer anew, given its neighbours, until nothing falls or the time is up."""
        gpus, cost = list(gpus), self.cost(gpus)
        for _ in range(DESCENT_SWEEPS):
            for layer in random.permutation(len(self.tasks)).tolist():
                if self.budget.left_s == 0:
                    return gpus
                gpus[layer] = self._best_layer(layer, gpus)
            self.budget.offer(_maps(self.tasks, gpus))
            after = self.cost(gpus)
            if after >= cost - 1e-6:
                break
            cost = after
        return gpus

    def _best_layer(self, layer: int, gpus: list[Integer]) -> Integer:
        linear_XG = np.zeros((len(gpus[layer]), self.G))
        if layer > 0:
            linear_XG -= self.pair_XX[layer - 1].T @ _members(gpus[layer - 1], self.G) @ self.saved_GG
        if layer < len(self.pair_XX):
            linear_XG -= self.pair_XX[layer] @ _members(gpus[layer + 1], self.G) @ self.saved_GG.T
        task = replace(self.tasks[layer], linear_XG=self.weight * linear_XG)
        deadline = time.monotonic() + self.budget.left_s
        found = [tabu_search(task, gpus[layer], rounds=DESCENT_ROUNDS, deadline=deadline)]
        if len(np.unique(task.expert_X)) == len(task.expert_X):
            found.append(tabu_search(task, _transport(linear_XG), rounds=DESCENT_ROUNDS, deadline=deadline))
        return min(found, key=lambda pair: pair[1])[0]

    def _saved(self, layer: int, gpus: list[Integer]) -> float:
        return float((self.pair_XX[layer] * self.saved_GG[gpus[layer][:, None], gpus[layer + 1]]).sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class _AnnealingJob:
    """One annealing for a worker process."""

    task: ChainTask
    seed: int
    steps: int
    deadline: float


def _anneal(job: _AnnealingJob) -> tuple[Integer, float]:
    """GPU of each item, and the price of imbalance at the end."""
    L, X = job.task.expert_LX.shape
    G = len(job.task.speed_G)
    random = np.random.default_rng(job.seed)
    has_copies = len(np.unique(job.task.expert_LX[0])) < X
    first_X = np.arange(X) * G // X
    start_LX = np.stack([first_X if has_copies else random.permutation(first_X) for _ in range(L)])
    annealing = ChainAnnealing(job.task, start_LX, job.seed)
    return annealing.run(job.steps, job.deadline), annealing.price


def _with_merged_folds(task: LayerTask) -> LayerTask:
    """At most HOPS_FOLDS loads, the mean of every few; several scenarios are few and stay."""
    W, X = task.weight_WX.shape
    if W <= HOPS_FOLDS or W % HOPS_FOLDS:
        return task
    return replace(task, weight_WX=task.weight_WX.reshape(HOPS_FOLDS, W // HOPS_FOLDS, X).mean(axis=1))


def _members(gpu_X: Integer, gpus: int) -> Float:
    return (gpu_X[:, None] == np.arange(gpus)).astype(np.float64)


def _transport(linear_XG: Float) -> Integer:
    """Exact assignment of items to GPUs for a linear cost."""
    from scipy.optimize import linear_sum_assignment

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
