"""Balance at any size: copy counts, LPT, pair swaps, and then kicks where a gap is left.

Shapes: W scenarios, L layers, E experts, G GPUs, P slots.
"""

import numpy as np
from numpy.typing import NDArray

from ..bounds.imbalance import imbalance_bound_L
from ..contract.certificate import PROVEN
from ..contract.problem import Problem
from ..heuristics.lpt import lpt_LP
from ..heuristics.replication import counts_of, replicate_LE, slots_of
from ..heuristics.swaps import balance_by_swaps
from ..run.budget import Budget
from .copies import change_counts, choose_counts
from .levels import peaks_L

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
SMALL_STEP = 1e-5  # relative; a layer so close to its bound is done, a smaller gain is none. Untried elsewhere
BEYOND = 2.0  # how far robust weights go beyond the scenarios, in units of the distance from the mean
LEAST_SHARE = 0.1  # of its mean load that an expert keeps out there: loads are not negative. Untried elsewhere
GOOD_WITH_COPIES = 1e-3  # the bound itself is no tighter with replicas
ROUNDS = 30  # kicks that may bring nothing: time against the last 1e-3 of the gap. Untried elsewhere
# Kicks with replicas that may bring nothing before the search ends, per slot and at most. Six layers of 32 experts, 2
# to 7 of them hot, 8 spare slots on 8 GPUs, reached what the exact programme reached (1.006 to 1.099) in 4,000 kicks.
COPY_ROUNDS_PER_SLOT, COPY_ROUNDS = 100, 4000
WORTH_MORE = 0.01  # a layer nearer to its bound gets ROUNDS kicks and no other counts. Untried elsewhere
MOST_VARIANTS = 24  # rows that are kicked and levelled in one pass: few layers would leave NumPy idle


def robust_weights(weight_WLE: Float) -> Float:
    """Several scenarios, their mean, the mean half smoothed, and each scenario at twice its distance from the mean.

    The last ones, on both sides of the mean, stand for workloads that go further than those known. Measured: a plan
    that also bears these is more even on workloads that it was not planned for.
    """
    if len(weight_WLE) == 1:
        return weight_WLE
    mean = weight_WLE.mean(axis=0, keepdims=True)
    even = np.broadcast_to(mean.mean(axis=2, keepdims=True), mean.shape)
    away = [np.maximum(mean + side * (weight_WLE - mean), LEAST_SHARE * mean) for side in (BEYOND, -BEYOND)]
    further = np.concatenate(away)
    total = np.maximum(further.sum(axis=2, keepdims=True), 1e-30)
    return np.concatenate([weight_WLE, mean, (mean + even) / 2, further / total * mean.sum(axis=2, keepdims=True)])


def lpt_start_LP(problem: Problem, weight_WLE: Float) -> Integer:
    """LPT alone: a complete map in milliseconds."""
    count_LE = replicate_LE(weight_WLE, problem.num_slots, problem.num_gpus)
    return lpt_LP(weight_WLE / count_LE, slots_of(count_LE), problem.cluster.speed_G)


def lpt_swap_LP(problem: Problem, weight_WLE: Float, deadline: float = float("inf")) -> Integer:
    """LPT and pair swaps for weights that are split evenly between copies."""
    speed_G = problem.cluster.speed_G
    count_LE = replicate_LE(weight_WLE, problem.num_slots, problem.num_gpus)
    start_LP = lpt_start_LP(problem, weight_WLE)
    target_L = peak_target_L(problem, weight_WLE)
    return balance_by_swaps(weight_WLE / count_LE, start_LP, speed_G, target_L=target_L, deadline=deadline)


def peak_target_L(problem: Problem, weight_WLE: Float) -> Float:
    """Fullest GPU (load over speed) at which a layer counts as done: just above the bound of its worst scenario."""
    speed_G = problem.cluster.speed_G
    bound_WL = np.stack(
        [
            imbalance_bound_L(_unit(w), problem.num_slots, speed_G, equal_shares=True)[0] * w.sum(axis=1)
            for w in weight_WLE
        ]
    )
    return np.asarray(bound_WL.max(axis=0) / speed_G.sum() * (1 + SMALL_STEP))


def kick_and_swap(problem: Problem, weight_WLE: Float, map_LP: Integer, budget: Budget) -> Integer:
    """Shuffle a few slots between GPUs of the layers that are not proved good, swap again, keep what improved.

    Args:
        problem: its slots, speeds and number of GPUs count.
        weight_WLE: loads, every scenario on the same scale.
        map_LP: a start; with replicas other copy counts are tried first and then in every round.
        budget: time and seed; offered every improvement.
    """
    random = np.random.default_rng(budget.seed)
    speed_G, G, E = problem.cluster.speed_G, problem.num_gpus, problem.num_experts
    has_copies = problem.num_slots > E
    target_L = peak_target_L(problem, weight_WLE) * (1 + (GOOD_WITH_COPIES if has_copies else PROVEN / 2))
    far_L = target_L * (1 + WORTH_MORE)
    best_LP = choose_counts(problem, weight_WLE, map_LP, far_L, budget.deadline) if has_copies else map_LP.copy()
    budget.offer(best_LP)
    peak_L = peaks_L(weight_WLE, best_LP, speed_G)
    rounds, since = (min(COPY_ROUNDS_PER_SLOT * problem.num_slots, COPY_ROUNDS) if has_copies else ROUNDS), 0
    while since < rounds:
        layers = np.flatnonzero(peak_L > (target_L if since < ROUNDS else far_L))
        if not len(layers) or budget.left_s == 0 or G == 1:
            break
        budget.tell("improving balance", since / rounds)
        variants = max(1, MOST_VARIANTS // len(layers)) if has_copies else 1
        rows = np.repeat(layers, variants)
        some_WLE = weight_WLE[:, rows]
        kicked_LP = best_LP[rows]
        if has_copies:
            kicked_LP = change_counts(kicked_LP, some_WLE.max(axis=0), G, random)
        kicked_LP = _kick(kicked_LP, G, random)
        per_copy = some_WLE / counts_of(kicked_LP, E)
        tried_LP = balance_by_swaps(per_copy, kicked_LP, speed_G, target_L=target_L[rows], deadline=budget.deadline)
        tried_LP, tried_L = _best_of(tried_LP, peaks_L(some_WLE, tried_LP, speed_G), variants)
        kept = tried_L <= peak_L[layers] if has_copies else tried_L < peak_L[layers]
        is_better = bool((tried_L < peak_L[layers] * (1 - SMALL_STEP)).any())
        best_LP[layers[kept]], peak_L[layers[kept]] = tried_LP[kept], tried_L[kept]
        budget.offer(best_LP)
        since = 0 if has_copies and is_better else since + variants
    return best_LP


def _best_of(tried_LP: Integer, peak_L: Float, variants: int) -> tuple[Integer, Float]:
    """Of so many rows for each layer, one after another, the one with the lowest peak."""
    best = peak_L.reshape(-1, variants).argmin(axis=1) + np.arange(0, len(peak_L), variants)
    return tried_LP[best], peak_L[best]


def _kick(map_LP: Integer, gpus: int, random: np.random.Generator) -> Integer:
    """Exchange the contents of some random pairs of slots, without putting two copies on one GPU."""
    kicked = map_LP.copy()
    per_gpu = map_LP.shape[1] // gpus
    for layer in range(len(kicked)):
        for _ in range(max(2, gpus // 8)):
            one, two = random.integers(map_LP.shape[1], size=2)
            here, there = one // per_gpu, two // per_gpu
            a, b = kicked[layer, one], kicked[layer, two]
            row_G = kicked[layer].reshape(gpus, per_gpu)
            if here != there and a not in row_G[there] and b not in row_G[here]:
                kicked[layer, one], kicked[layer, two] = b, a
    return kicked


def _unit(weight_LE: Float) -> Float:
    total_L1 = weight_LE.sum(axis=1, keepdims=True)
    return np.divide(weight_LE, total_L1, out=np.zeros_like(weight_LE), where=total_L1 > 0)
