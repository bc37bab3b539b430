"""Pair swaps for balance: exchange a slot of the fullest GPU with the one that best levels the two; all layers at once.

Shapes: W scenarios, A layers still improving, G GPUs, P slots, S slots per GPU, Q partner GPUs.
"""

import time

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
MAX_CELLS = 1 << 24  # numbers per table of swaps, 128 MiB; with fewer layers more partner GPUs are looked at


def balance_by_swaps(
    weight_WLE: Float,
    expert_LP: Integer,
    speed_G: Float,
    *,
    target_L: Float,
    max_rounds: int = 2000,
    deadline: float = float("inf"),
) -> Integer:
    """Swap slots while that lowers the fullest GPU of a layer, over all scenarios.

    Args:
        weight_WLE: load of one copy of each expert, every scenario on the same scale.
        expert_LP: a map to start from, GPU by GPU.
        speed_G: relative speed of each GPU.
        target_L: a layer whose fullest GPU is at or below this is finished.
        max_rounds: at most this many swaps per layer.
        deadline: `time.monotonic()` at which to stop.

    Returns:
        The improved map; no GPU gets a second copy of an expert that it did not have.
    """
    state = _State(weight_WLE, expert_LP.copy(), speed_G)
    active = np.arange(expert_LP.shape[0])
    for _ in range(max_rounds):
        active = active[state.peak_L(active) > target_L[active]]
        if not len(active) or time.monotonic() > deadline:
            break
        active = active[state.swap_best(active)]
    return state.expert_LP


class _State:
    """Loads and map of all layers; `swap_best` advances some of them by one swap each."""

    def __init__(self, weight_WLE: Float, expert_LP: Integer, speed_G: Float) -> None:
        W, L, E = weight_WLE.shape
        self.expert_LP, self.speed_G = expert_LP, speed_G
        self.G, self.P = len(speed_G), expert_LP.shape[1]
        self.S = self.P // self.G
        self.slot_WLP = np.take_along_axis(weight_WLE, np.broadcast_to(expert_LP, (W, L, self.P)), axis=2)
        self.load_WLG = self.slot_WLP.reshape(W, L, self.G, self.S).sum(axis=3)
        self.has_copies = self.P > E
        room = MAX_CELLS // max(1, W * L * self.S * self.S)
        self.Q = min(self.G - 1, max(4, room), 96)

    def peak_L(self, layers: Integer) -> Float:
        return np.asarray((self.load_WLG[:, layers] / self.speed_G).max(axis=(0, 2)))

    def swap_best(self, layers: Integer) -> NDArray[np.bool_]:
        """One swap in each of `layers`; returns which of them improved."""
        if self.Q == 0:
            return np.zeros(len(layers), bool)
        A, S = len(layers), self.S
        row = np.arange(A)
        load_WAG = self.load_WLG[:, layers]
        level_AG = (load_WAG / self.speed_G).max(axis=0)
        hot_A = level_AG.argmax(axis=1)
        hot_level_A = level_AG[row, hot_A]
        partner_AQ = self._partners(level_AG, hot_A)
        slot_AQS = partner_AQ[:, :, None] * S + np.arange(S)
        hot_slot_AS = hot_A[:, None] * S + np.arange(S)
        partner_WAN = self.slot_WLP[:, layers[:, None], slot_AQS.reshape(A, -1)]
        hot_WAS = self.slot_WLP[:, layers[:, None], hot_slot_AS]
        gain_WASN = hot_WAS[:, :, :, None] - partner_WAN[:, :, None, :]
        hot_load = load_WAG[:, row, hot_A] / self.speed_G[hot_A]
        partner_load = np.repeat(load_WAG[:, row[:, None], partner_AQ] / self.speed_G[partner_AQ], S, axis=2)
        slow_hot = (1 / self.speed_G[hot_A])[None, :, None, None]
        slow_partner = np.repeat(1 / self.speed_G[partner_AQ], S, axis=1)[None, :, None, :]
        after_ASN = np.maximum(
            hot_load[:, :, None, None] - gain_WASN * slow_hot, partner_load[:, :, None, :] + gain_WASN * slow_partner
        ).max(axis=0)
        if self.has_copies:
            after_ASN[self._doubles(layers, hot_slot_AS, slot_AQS)] = np.inf
        best_A = after_ASN.reshape(A, -1).argmin(axis=1)
        improved_A = after_ASN.reshape(A, -1)[row, best_A] < hot_level_A * (1 - 1e-12)
        own_A, other_A = np.divmod(best_A, after_ASN.shape[2])
        self._apply(
            layers[improved_A],
            hot_slot_AS[row, own_A][improved_A],
            slot_AQS.reshape(A, -1)[row, other_A][improved_A],
        )
        return improved_A

    def _partners(self, level_AG: Float, hot_A: Integer) -> Integer:
        """The Q lightest GPUs of each layer other than the fullest one; `level_AG` is used up."""
        level_AG[np.arange(len(hot_A)), hot_A] = np.inf
        if self.Q < self.G - 1:
            return np.argpartition(level_AG, self.Q - 1, axis=1)[:, : self.Q]
        return np.argsort(level_AG, axis=1)[:, : self.Q]

    def _doubles(self, layers: Integer, hot_slot_AS: Integer, slot_AQS: Integer) -> NDArray[np.bool_]:
        """Swaps that would put two copies of an expert on one GPU (exchanging equal experts included)."""
        hot_AS = self.expert_LP[layers[:, None], hot_slot_AS]
        other_AQS = self.expert_LP[layers[:, None, None], slot_AQS]
        A, Q, S = other_AQS.shape
        into_partner_ASQ = (hot_AS[:, :, None, None] == other_AQS[:, None]).any(axis=3)
        into_hot_AN = (other_AQS.reshape(A, Q * S)[:, None, :] == hot_AS[:, :, None]).any(axis=1)
        return np.repeat(into_partner_ASQ, S, axis=2) | into_hot_AN[:, None, :]

    def _apply(self, layers: Integer, slot: Integer, other: Integer) -> None:
        gain_WA = self.slot_WLP[:, layers, slot] - self.slot_WLP[:, layers, other]
        self.load_WLG[:, layers, slot // self.S] -= gain_WA
        self.load_WLG[:, layers, other // self.S] += gain_WA
        for array in (self.expert_LP, *self.slot_WLP):
            array[layers, slot], array[layers, other] = array[layers, other], array[layers, slot].copy()
