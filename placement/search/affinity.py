"""Fan-out and balance together, all layers in parallel.

Loads are taken per fold of the sequences, and the mean of the folds' fullest GPUs is what counts: a plan that is level
on every part of the data is level on data that was not seen. With several scenarios the worst one's level counts.
Shapes: W folds or scenarios, L layers, E experts, X items (copies), G GPUs, P slots.
"""

import time
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import Plan
from ..contract.problem import Problem
from ..data.bundles import Bundles, unique_sets
from ..heuristics.recount import recount
from ..heuristics.replication import counts_of
from ..objectives import PartWeights
from ..objectives.churn import require_same_model
from ..objectives.fanout import gpu_fanout, node_fanout
from ..run.budget import Budget
from ..run.workers import in_workers
from .layer import Effort, search_layer
from .tabu import LayerTask, SearchState

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
# Folds of the sequences whose fullest GPUs are averaged: time and noise of each against what the mean load hides. The
# hops search merges them into HOPS_FOLDS. Untried elsewhere.
FANOUT_FOLDS = 8
MIN_SEQUENCES = 4 * FANOUT_FOLDS  # four per fold at least
PARALLEL_TOKENS = 100_000  # tokens x layers that pay for starting processes


def search_affinity(
    problem: Problem, start_LP: Integer, budget: Budget, weights: PartWeights, *, effort: Effort
) -> Integer:
    """Improve a map layer by layer for fan-out, imbalance above a goal, and churn.

    Args:
        problem: has tokens if there is a weight of fan-out.
        start_LP: a map to start from; its copy counts are kept.
        budget: time, seed, processes; told of progress.
        weights: of the objective; hops are left out.
        effort: how hard to try.
    """
    map_LP = start_LP.copy()
    churn_LXG = churn_costs(problem, start_LP, weights.churn)
    jobs = (
        _LayerJob(
            problem=problem.restrict(np.array([layer])),
            map_P=start_LP[layer],
            layer=layer,
            weights=weights,
            churn_XG=None if churn_LXG is None else churn_LXG[layer],
            effort=effort,
            seed=budget.seed,
            deadline=budget.deadline,
            rounds_left=-(-(problem.num_layers - layer) // budget.processes),
        )
        for layer in range(problem.num_layers)
    )
    for done, (layer, map_P) in enumerate(in_workers(_search_one, jobs, _processes(problem, budget))):
        map_LP[layer] = map_P
        budget.offer(map_LP)
        budget.tell("searching layers", (done + 1) / problem.num_layers)
    return map_LP


def running_LP(problem: Problem) -> Integer | None:
    """The map that runs now if the problem has as many slots; None where a new one must be made."""
    current = problem.current
    if current is None or current.cluster.num_gpus != problem.num_gpus or current.num_slots != problem.num_slots:
        return None
    require_same_model(current, problem)
    return current.physical_to_logical_LP.copy()


def churn_costs(problem: Problem, map_LP: Integer, price: float) -> Float | None:
    """[L, X, G]: what it costs to have the slot's expert on a GPU that has no copy of it now."""
    if not price:
        return None
    size = problem.cluster.model.bytes_per_expert
    if problem.current is None or size is None:
        raise ValueError("churn needs the plan that runs now (--current) and model.expert_bytes in the cluster file")
    shared = min(problem.num_gpus, problem.current.cluster.num_gpus)
    is_new_LEG = np.ones((problem.num_layers, problem.num_experts, problem.num_gpus), np.float32)
    is_new_LEG[:, :, :shared] = problem.current.copies_LEG[:, :, :shared] == 0
    return np.asarray(np.take_along_axis(is_new_LEG, map_LP[:, :, None], axis=1) * (price * size / 1e9))


def layer_task(
    problem: Problem, map_P: Integer, layer: int, weights: PartWeights, *, seed: int, linear_XG: Float | None = None
) -> LayerTask:
    """One layer as the search sees it: slots are items, tokens are dealt to the copies of an expert at random."""
    random = np.random.default_rng([seed, layer])
    sets = [
        _item_sets(scenario.trace.expert_TLK[:, layer], map_P, random)
        for scenario in problem.scenarios
        if scenario.trace is not None
    ]
    count_E = np.maximum(np.bincount(map_P, minlength=problem.num_experts), 1)
    weight_WE = _fold_weights(problem, layer)
    return LayerTask(
        bundles=_joined(sets) if sets else Bundles(np.zeros((0, 1), np.int64), np.zeros(0)),
        weight_WX=(weight_WE / count_E)[:, map_P],
        expert_X=map_P,
        speed_G=problem.cluster.speed_G,
        node_G=problem.cluster.node_G,
        fan=weights.fan,
        node=weights.node,
        level=weights.level,
        goal=weights.goal,
        worst=len(problem.scenarios) > 1,
        linear_XG=linear_XG,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _LayerJob:
    """One layer for a worker process, which builds its own task; `rounds_left` layers follow one another until then."""

    problem: Problem
    map_P: Integer
    layer: int
    weights: PartWeights
    churn_XG: Float | None
    effort: Effort
    seed: int
    deadline: float
    rounds_left: int


def _processes(problem: Problem, budget: Budget) -> int:
    """As many as the budget has where there is work for them."""
    tokens = sum(scenario.trace.num_tokens for scenario in problem.scenarios if scenario.trace is not None)
    pays = problem.num_layers > 1 and tokens * problem.num_layers >= PARALLEL_TOKENS
    return budget.processes if pays else 1


def _search_one(job: _LayerJob) -> tuple[int, Integer]:
    """The searched map of one layer; its old map once the time is up."""
    now = time.monotonic()
    if now >= job.deadline:
        return job.layer, job.map_P
    until = now + (job.deadline - now) / job.rounds_left
    if not _may_recount(job):
        return job.layer, _searched(job, job.map_P, until)
    first_P = _searched(job, job.map_P, now + (until - now) / 2)
    if time.monotonic() >= until:
        return job.layer, first_P
    second_P = _searched(job, _recounted(job, first_P), until)
    return job.layer, min(first_P, second_P, key=lambda map_P: _exact_cost(job, map_P))


def _searched(job: _LayerJob, map_P: Integer, until: float) -> Integer:
    task = layer_task(job.problem, map_P, 0, job.weights, seed=job.seed + job.layer, linear_XG=job.churn_XG)
    known_X = np.arange(len(map_P)) // job.problem.slots_per_gpu
    gpu_X, _ = search_layer(task, known_X, job.effort, job.seed * 1000 + job.layer, until)
    return np.asarray(map_P[np.argsort(gpu_X, kind="stable")])


def _exact_cost(job: _LayerJob, map_P: Integer) -> float:
    """Expected fan-out over all choices of copies; the search itself sees one choice per token."""
    problem, weights = job.problem, job.weights
    plan = Plan(
        physical_to_logical_LP=map_P[None],
        num_experts=problem.num_experts,
        cluster=problem.cluster,
        layer_ids=(0,),
        hidden_layers=1,
    )
    traces = [scenario.trace for scenario in problem.scenarios if scenario.trace is not None]
    gpu, node = (np.mean([fan(plan, trace) for trace in traces]) for fan in (gpu_fanout, node_fanout))
    task = layer_task(problem, map_P, 0, replace(weights, fan=0, node=0), seed=0)
    level = SearchState(task, np.arange(len(map_P)) // problem.slots_per_gpu).cost
    return float(weights.fan * gpu + weights.node * node + level)


def _may_recount(job: _LayerJob) -> bool:
    """Whether another choice of the copied experts may pay: replicas, fan-out, and no plan to stay close to."""
    has_replicas = job.problem.num_experts < len(job.map_P)
    return has_replicas and job.churn_XG is None and bool(job.weights.fan or job.weights.node)


def _recounted(job: _LayerJob, map_P: Integer) -> Integer:
    traces = [scenario.trace for scenario in job.problem.scenarios if scenario.trace is not None]
    bundles = _joined([unique_sets(trace.expert_TLK[:, 0]) for trace in traces])
    pair_EE = bundles.coactivation(job.problem.num_experts) / max(bundles.tokens, 1.0)
    cluster, weights = job.problem.cluster, job.weights
    same_node_GG = cluster.node_G[:, None] == cluster.node_G
    worth_GG = weights.fan * np.eye(cluster.num_gpus) + weights.node * same_node_GG
    weight_WE = _fold_weights(job.problem, 0)
    return recount(map_P, pair_EE, weight_WE, cluster.speed_G, price=weights.level, worth_GG=worth_GG)


def _item_sets(expert_TK: NDArray[np.int16], map_P: Integer, random: np.random.Generator) -> Bundles:
    """Sets of slots: each use of an expert goes to one of its copies."""
    experts = int(map_P.max()) + 1
    count_E = counts_of(map_P[None], experts)[0]
    first_E = np.concatenate([[0], np.cumsum(count_E)[:-1]])
    slot_of = np.append(np.argsort(map_P, kind="stable"), -1)
    safe_TK = np.where(expert_TK >= 0, expert_TK, 0)
    pick_TK = (random.random(expert_TK.shape) * count_E[safe_TK]).astype(np.int64)
    return unique_sets(np.where(expert_TK >= 0, slot_of[first_E[safe_TK] + pick_TK], -1))


def _joined(sets: list[Bundles]) -> Bundles:
    """All scenarios together, each with the same total weight."""
    if len(sets) == 1:
        return sets[0]
    most = max(one.tokens for one in sets)
    items = np.concatenate([one.item_BK for one in sets])
    return unique_sets(items, np.concatenate([one.count_B * (most / max(one.tokens, 1)) for one in sets]))


def _fold_weights(problem: Problem, layer: int) -> Float:
    """Loads of one layer per scenario, or per fold of the sequences if there is one scenario with enough of them."""
    if len(problem.scenarios) > 1:
        return problem.weight_WLE[:, layer]
    trace = problem.scenarios[0].trace
    if trace is None:
        return problem.weight_WLE[:, layer]
    sequences, of_T = np.unique(trace.sequence_T, return_inverse=True)
    if len(sequences) < MIN_SEQUENCES:
        return problem.weight_WLE[:, layer]
    fold_S = np.random.default_rng(0).permutation(len(sequences)) % FANOUT_FOLDS
    expert_TK = trace.expert_TLK[:, layer]
    fold_TK = np.broadcast_to(fold_S[of_T][:, None], expert_TK.shape)
    used = expert_TK >= 0
    flat = fold_TK[used].astype(np.int64) * problem.num_experts + expert_TK[used]
    load_WE = (
        np.bincount(flat, minlength=FANOUT_FOLDS * problem.num_experts).reshape(FANOUT_FOLDS, -1).astype(np.float64)
    )
    total_W1 = load_WE.sum(axis=1, keepdims=True)
    return np.divide(load_WE, total_W1, out=np.zeros_like(load_WE), where=total_W1 > 0)
