"""Valid lower bounds on imbalance (fullest over mean GPU), cheap and per layer.

Shapes: W scenarios, L layers, E experts, G GPUs, S slots per GPU. Loads are weights that sum to 1 per layer.
"""

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


def cardinality_bound_L(weight_LE: Float, gpus: int) -> Float:
    """Bound for one copy per expert, equal GPUs: the q GPUs of the h heaviest experts must also take light ones.

    If the h heaviest experts sit on q <= h GPUs, those GPUs hold q * S experts in all: at least the h heaviest and the
    q * S - h lightest. Their mean load is a bound for that q; the least over q holds in any case, and the largest over
    h is returned. h = 1 is the hottest expert with S - 1 lightest ones, h = E the mean.
    """
    L, E = weight_LE.shape
    S = E // gpus
    heavy = np.concatenate([np.zeros((L, 1)), np.cumsum(-np.sort(-weight_LE, axis=1), axis=1)], axis=1)
    light = np.concatenate([np.zeros((L, 1)), np.cumsum(np.sort(weight_LE, axis=1), axis=1)], axis=1)
    bound_L = heavy[:, -1] / gpus
    for h in range(1, min(E, gpus) + 1):
        q = np.arange(-(-h // S), h + 1)
        bound_L = np.maximum(bound_L, ((heavy[:, [h]] + light[:, q * S - h]) / q).min(axis=1))
    return bound_L * gpus


def copies_bound_L(weight_LE: Float, slots: int, gpus: int, speed_G: Float) -> Float:
    """Bound with replicas of equal share: the mean, and what the hottest copy weighs under the best copy counts.

    An expert with r <= G copies puts w / r on each of its GPUs. Any counts that use P slots leave some expert with at
    least the least possible max w / r, and some GPU holds that copy. Weights sum to 1 per layer.
    """
    L = len(weight_LE)
    mean_L = np.ones(L) / speed_G.sum()
    peak_L = _least_peak_L(weight_LE, slots, gpus) / speed_G.max()
    return np.maximum(mean_L, peak_L) * speed_G.sum()


def fluid_bound_L(speed_G: Float, layers: int) -> Float:
    """Bound for any division of tokens between copies (quota dispatch): the mean."""
    return np.ones(layers)


def imbalance_bound_L(weight_LE: Float, slots: int, speed_G: Float, *, equal_shares: bool) -> tuple[Float, str]:
    """The best of the bounds that apply, per layer, with its name.

    Args:
        weight_LE: expert loads, each layer summing to 1 (or to 0: then the bound is 1).
        slots: P, at least E; all of a layer.
        speed_G: relative speed of each GPU, positive; only ratios count.
        equal_shares: copies of one expert get equal shares (uniform dispatch).
    """
    G, E = len(speed_G), weight_LE.shape[1]
    is_empty_L = weight_LE.sum(axis=1) == 0
    if slots == E and np.all(speed_G == speed_G[0]):
        bound_L, name = cardinality_bound_L(weight_LE, G), "cardinality"
    elif equal_shares or slots == E:
        bound_L, name = copies_bound_L(weight_LE, slots, G, speed_G), "copies"
    else:
        bound_L, name = fluid_bound_L(speed_G, len(weight_LE)), "fluid"
    return np.where(is_empty_L, 1.0, np.maximum(bound_L, 1.0)), name


def _least_peak_L(weight_LE: Float, slots: int, gpus: int) -> Float:
    """Least possible largest load per copy with `slots` copies in all, at most one copy per GPU."""
    from ..heuristics.replication import replicate_LE

    count_LE = replicate_LE(weight_LE[None], slots, gpus)
    return np.asarray((weight_LE / count_LE).max(axis=1))
