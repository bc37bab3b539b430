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

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
SMALL_STEP = 1e-5
BEYOND = 2.0  # how far robust weights go beyond the scenarios, in units of the distance from the mean
LEAST_SHARE = 0.1
GOOD_WITH_COPIES = 1e-3  # the bound itself is no tighter with replicas


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


def lpt_swap_LP(problem: Problem, weight_WLE: Float, deadline: float = float("inf")) -> Integer:
    """LPT and pair swaps for weights that are split evenly between copies."""
    speed_G = problem.cluster.speed_G
    count_LE = replicate_LE(weight_WLE, problem.num_slots, problem.num_gpus)
    start_LP = lpt_LP(weight_WLE / count_LE, slots_of(count_LE), speed_G)
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


def peaks_L(weight_WLE: Float, map_LP: Integer, speed_G: Float) -> Float:
    """Fullest GPU (load over speed) of each layer, worst scenario."""
    count_LE = counts_of(map_LP, weight_WLE.shape[2])
    slot_WLP = np.take_along_axis(
        weight_WLE / np.maximum(count_LE, 1), np.broadcast_to(map_LP, (len(weight_WLE), *map_LP.shape)), axis=2
    )
    load_WLG = slot_WLP.reshape(*slot_WLP.shape[:2], len(speed_G), -1).sum(axis=3)
    return np.asarray((load_WLG / speed_G).max(axis=(0, 2)))


def kick_and_swap(
    problem: Problem, weight_WLE: Float, map_LP: Integer, budget: Budget, max_rounds: int = 30
) -> Integer:
    """Shuffle a few slots between GPUs of the layers that are not proved good, swap again, keep what improved."""
    random = np.random.default_rng(budget.seed)
    speed_G, G = problem.cluster.speed_G, problem.num_gpus
    has_copies = problem.num_slots > problem.num_experts
    target_L = peak_target_L(problem, weight_WLE) * (1 + (GOOD_WITH_COPIES if has_copies else PROVEN / 2))
    best_LP, peak_L = map_LP.copy(), peaks_L(weight_WLE, map_LP, speed_G)
    for turn in range(max_rounds):
        layers = np.flatnonzero(peak_L > target_L)
        if not len(layers) or budget.left_s == 0 or G == 1:
            break
        budget.tell("improving balance", turn / max_rounds)
        kicked_LP = _kick(best_LP[layers], weight_WLE.shape[2], G, random)
        per_copy = weight_WLE[:, layers] / counts_of(kicked_LP, weight_WLE.shape[2])
        tried_LP = balance_by_swaps(per_copy, kicked_LP, speed_G, target_L=target_L[layers], deadline=budget.deadline)
        tried_L = peaks_L(weight_WLE[:, layers], tried_LP, speed_G)
        better = tried_L < peak_L[layers]
        best_LP[layers[better]], peak_L[layers[better]] = tried_LP[better], tried_L[better]
        budget.offer(best_LP)
    return best_LP


def _kick(map_LP: Integer, experts: int, gpus: int, random: np.random.Generator) -> Integer:
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
