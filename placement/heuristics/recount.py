"""Which experts have the extra copies, chosen together with where they are.

A replica slot takes up another expert where that lowers (price * fullest GPU) - (worth of co-activated pairs met).
Tokens go to the copies of an expert evenly, so with share s[e, g] of an expert's tokens on a GPU, a pair of experts is
worth s[e] . worth . s[f]. Pairs stand for fan-out here; whoever calls judges the result by the fan-out itself.
Shapes: W scenarios, E experts, G GPUs, N candidate moves.
"""

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
MAX_MOVES = 200  # of replica slots, a guard; the descent ends where nothing falls
LEAST_GAIN = 1e-9  # below it a gain is rounding, and moves could go in a circle


def recount(
    map_P: Integer, pair_EE: Float, weight_WE: Float, speed_G: Float, *, price: float, worth_GG: Float
) -> Integer:
    """Change the experts of replica slots of one layer while the cost falls.

    Args:
        map_P: expert of each slot, GPU by GPU.
        pair_EE: tokens that use both experts, as a share of all tokens; diagonal 0.
        weight_WE: load of each expert, each scenario summing to 1.
        speed_G: relative speed of each GPU, positive.
        price: of one unit of fullest over mean GPU.
        worth_GG: of one pair per token that meets on two GPUs (the same one, two of a node); symmetric.
    """
    map_P = map_P.copy()
    for _ in range(min(MAX_MOVES, 2 * len(map_P))):
        slot_N, expert_N = _candidates(map_P, len(pair_EE), len(speed_G))
        if not len(slot_N):
            break
        change_N = _changes(map_P, slot_N, expert_N, pair_EE, weight_WE, speed_G, price, worth_GG)
        best = int(change_N.argmin())
        if change_N[best] >= -LEAST_GAIN:
            break
        map_P[slot_N[best]] = expert_N[best]
    return map_P


def _candidates(map_P: Integer, experts: int, gpus: int) -> tuple[Integer, Integer]:
    """Every slot whose expert has another copy, with every expert that its GPU lacks."""
    count_E = np.bincount(map_P, minlength=experts)
    spare = np.flatnonzero(count_E[map_P] > 1)
    holds_GE = np.zeros((gpus, experts), bool)
    holds_GE[np.arange(len(map_P)) * gpus // len(map_P), map_P] = True
    row, expert_N = np.nonzero(~holds_GE[spare * gpus // len(map_P)])
    return spare[row], expert_N


def _changes(
    map_P: Integer,
    slot_N: Integer,
    expert_N: Integer,
    pair_EE: Float,
    weight_WE: Float,
    speed_G: Float,
    price: float,
    worth_GG: Float,
) -> Float:
    G, P = len(speed_G), len(map_P)
    copies_EG = np.zeros((len(pair_EE), G))
    np.add.at(copies_EG, (map_P, np.arange(P) * G // P), 1)
    count_E = copies_EG.sum(axis=1)
    share_EG = copies_EG / count_E[:, None]
    near_EG = pair_EE @ (share_EG @ worth_GG)
    old_N, gpu_N = map_P[slot_N], slot_N * G // P
    at_NG = np.eye(G)[gpu_N]
    less_NG = (copies_EG[old_N] - at_NG) / (count_E[old_N] - 1)[:, None] - share_EG[old_N]
    more_NG = (copies_EG[expert_N] + at_NG) / (count_E[expert_N] + 1)[:, None] - share_EG[expert_N]
    pairs_N = (less_NG * near_EG[old_N]).sum(axis=1) + (more_NG * near_EG[expert_N]).sum(axis=1)
    pairs_N += pair_EE[old_N, expert_N] * (less_NG @ worth_GG * more_NG).sum(axis=1)
    slow_G = speed_G.sum() / speed_G
    level_N = np.zeros(len(slot_N))
    for weight_E in weight_WE:
        load_G = weight_E @ share_EG
        after_NG = load_G + weight_E[old_N][:, None] * less_NG + weight_E[expert_N][:, None] * more_NG
        level_N += (after_NG * slow_G).max(axis=1) - (load_G * slow_G).max()
    return np.asarray(price * level_N / len(weight_WE) - pairs_N)
