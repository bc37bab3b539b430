"""Search for the tail of batches: copy counts and places that keep the worst batches of the traffic balanced.

The cost of a layer is the mean, over the worst tenth of the batches, of the fullest GPU over the mean one, with rows
spread evenly over copies. Moves give a spare copy's slot to another expert, or swap slots of two GPUs.
A part of the layer's mean enters every batch, or the search would fit the batches at hand.

Shapes: A batches, E experts, G GPUs, P slots, N rows of a table of moves.
"""

import time

import numpy as np
from numpy.typing import NDArray

from ..contract.problem import Problem
from ..data.batches import count_rows_AE, spread, traffic_batches
from ..objectives.batches import MOST_BATCHES, TAIL, batch_size
from ..run.budget import Budget

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
SMOOTHING = 0.25  # part of the layer's mean in every batch: GPT-OSS, 64 GPUs: 0, 0.25 alike on other data, 0.5 worse
LEAST_GAIN = 1e-9  # below it a gain is rounding
MOST_CELLS = 1 << 24  # numbers per table of moves, 128 MiB
MOST_MOVES = 400  # of one layer, a guard; the descent ends where nothing falls


def search_batches(problem: Problem, start_LP: Integer, budget: Budget) -> Integer:
    """Improve a map layer by layer for the batches of all scenarios' traces.

    Args:
        problem: every scenario has its tokens.
        start_LP: a complete map.
        budget: time; offered every layer.
    """
    map_LP = start_LP.copy()
    tokens = problem.cluster.ep.batch_tokens
    traces = [scenario.trace for scenario in problem.scenarios if scenario.trace is not None]
    batches = [spread(traffic_batches(trace, batch_size(trace, tokens)), MOST_BATCHES) for trace in traces]
    for layer in range(problem.num_layers):
        budget.tell("batches", layer / problem.num_layers)
        rows = [count_rows_AE(trace, batch_AT, layer) for trace, batch_AT in zip(traces, batches, strict=True)]
        rows_AE = np.zeros((sum(map(len, rows)), problem.num_experts))
        rows_AE[:, : rows[0].shape[1]] = np.concatenate(rows)
        share = budget.left_s / (problem.num_layers - layer)
        deadline = time.monotonic() + share
        map_LP[layer] = search_tail(rows_AE, map_LP[layer], problem.cluster.speed_G, deadline)
        budget.offer(map_LP)
    return map_LP


def search_tail(rows_AE: Float, map_P: Integer, speed_G: Float, deadline: float) -> Integer:
    """Improve one layer's map until no move helps.

    Args:
        rows_AE: rows of each batch.
        map_P: expert of each slot, GPU by GPU; every expert has one, none two on one GPU.
        speed_G: relative speed of each GPU, positive.
        deadline: `time.monotonic()` at which to stop.
    """
    total_A1 = np.maximum(rows_AE.sum(axis=1, keepdims=True), 1e-300)
    share_AE = rows_AE / total_A1
    share_AE = (1 - SMOOTHING) * share_AE + SMOOTHING * share_AE.mean(axis=0)
    state = _Layer(share_AE, map_P.copy(), speed_G)
    for _ in range(MOST_MOVES):
        if time.monotonic() > deadline or not (state.recount() or state.swap()):
            break
    return state.map_P


class _Layer:
    """One layer's map and the loads that it gives in every batch."""

    def __init__(self, share_AE: Float, map_P: Integer, speed_G: Float) -> None:
        self.share_AE, self.map_P, self.slow_G = share_AE, map_P, speed_G.sum() / speed_G
        self.G, self.S = len(speed_G), len(map_P) // len(speed_G)
        self.tail = max(1, round(TAIL * len(share_AE)))
        self._refresh()

    def _refresh(self) -> None:
        E = self.share_AE.shape[1]
        self.copies_EG = np.zeros((E, self.G))
        np.add.at(self.copies_EG, (self.map_P, np.arange(len(self.map_P)) // self.S), 1)
        self.count_E = self.copies_EG.sum(axis=1)
        self.load_AG = (self.share_AE / self.count_E) @ self.copies_EG * self.slow_G
        self.cost = self._tail_mean(self.load_AG.max(axis=1)[None])[0]

    def _tail_mean(self, peak_NA: Float) -> Float:
        return np.asarray(np.sort(peak_NA, axis=1)[:, -self.tail :].mean(axis=1))

    def _hot_gpus(self) -> Integer:
        """Fullest GPUs of the batches of the tail."""
        worst = np.argsort(self.load_AG.max(axis=1))[-self.tail :]
        return np.unique(self.load_AG[worst].argmax(axis=1))

    def recount(self) -> bool:
        """Give the best spare slot to the best of the experts on the fullest GPUs."""
        spare = np.flatnonzero(self.count_E[self.map_P] > 1)
        hot = np.unique(self.map_P.reshape(self.G, self.S)[self._hot_gpus()])
        slot_N, new_N = (part.ravel() for part in np.meshgrid(spare, hot, indexing="ij"))
        gpu_N = slot_N // self.S
        keep = self.copies_EG[new_N, gpu_N] == 0 if len(slot_N) else np.zeros(0, bool)
        slot_N, new_N, gpu_N = slot_N[keep], new_N[keep], gpu_N[keep]
        best = (self.cost * (1 - LEAST_GAIN), -1, -1)
        step = max(1, MOST_CELLS // self.load_AG.size)
        for start in range(0, len(slot_N), step):
            part = slice(start, start + step)
            cost_N = self._after_recount(slot_N[part], new_N[part], gpu_N[part])
            if cost_N.min() < best[0]:
                index = start + int(cost_N.argmin())
                best = (float(cost_N.min()), int(slot_N[index]), int(new_N[index]))
        if best[1] < 0:
            return False
        self.map_P[best[1]] = best[2]
        self._refresh()
        return True

    def _after_recount(self, slot_N: Integer, new_N: Integer, gpu_N: Integer) -> Float:
        old_N, at_NG = self.map_P[slot_N], np.eye(self.G)[gpu_N]
        less_NG = (self.copies_EG[old_N] - at_NG) / (self.count_E[old_N] - 1)[:, None]
        less_NG -= self.copies_EG[old_N] / self.count_E[old_N][:, None]
        more_NG = (self.copies_EG[new_N] + at_NG) / (self.count_E[new_N] + 1)[:, None]
        more_NG -= self.copies_EG[new_N] / self.count_E[new_N][:, None]
        change_NAG = (
            self.share_AE.T[old_N][:, :, None] * less_NG[:, None]
            + self.share_AE.T[new_N][:, :, None] * more_NG[:, None]
        )
        return self._tail_mean((self.load_AG + change_NAG * self.slow_G).max(axis=2))

    def swap(self) -> bool:
        """The best exchange of a slot of one of the fullest GPUs with a slot elsewhere."""
        per_copy_AE = self.share_AE / self.count_E
        best = (self.cost * (1 - LEAST_GAIN), -1, -1)
        slots = np.arange(len(self.map_P))
        for hot in self._hot_gpus().tolist():
            other_N = slots[slots // self.S != hot]
            gpu_N, theirs_N = other_N // self.S, self.map_P[other_N]
            for slot in range(hot * self.S, (hot + 1) * self.S):
                own = int(self.map_P[slot])
                allowed = (self.copies_EG[own, gpu_N] == 0) & (self.copies_EG[theirs_N, hot] == 0)
                if not allowed.any():
                    continue
                cost_N = self._after_swaps(per_copy_AE, own, theirs_N[allowed], hot, gpu_N[allowed])
                if cost_N.min() < best[0]:
                    best = (float(cost_N.min()), slot, int(other_N[allowed][cost_N.argmin()]))
        if best[1] < 0:
            return False
        self.map_P[[best[1], best[2]]] = self.map_P[[best[2], best[1]]]
        self._refresh()
        return True

    def _after_swaps(self, per_copy_AE: Float, own: int, theirs_N: Integer, hot: int, gpu_N: Integer) -> Float:
        """Only two GPUs change; the largest of the others is among the three fullest of each batch."""
        moved_NA = (per_copy_AE[:, [own]] - per_copy_AE[:, theirs_N]).T
        three_A3 = np.argsort(self.load_AG, axis=1)[:, -3:]
        load_A3 = np.take_along_axis(self.load_AG, three_A3, axis=1)
        is_other_NA3 = (three_A3 != hot) & (three_A3[None] != gpu_N[:, None, None])
        rest_NA = np.where(is_other_NA3, load_A3, 0.0).max(axis=2)
        here_NA = self.load_AG[:, hot] - moved_NA * self.slow_G[hot]
        there_NA = self.load_AG[:, gpu_N].T + moved_NA * self.slow_G[gpu_N][:, None]
        return self._tail_mean(np.maximum(rest_NA, np.maximum(here_NA, there_NA)))
