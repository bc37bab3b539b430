"""The checker's own search of a layer: which plans on GPUs lie below a bound that an integer programme proved.

Best first, experts by falling load: each chooses a set of GPUs, with one copy of equal share on each. No plan that goes
on from some choices has less than

    level * max(fullest GPU so far, what some GPUs must carry because the others cannot)
    + fan * (GPUs touched so far and what the rest must touch besides) + node * (the same of nodes).

A GPU with r free slots gets at most the r heaviest of the rest. A token set with u experts left touches at least 1/u
further GPUs for each of them that goes where none of it is.
A search that ends by its limit has still proved the least such value among what it left open.
As in the programme, no GPU holds an expert twice. Shapes: W scenarios, E experts, G GPUs, M nodes, S slots per GPU,
B token sets, O sets of GPUs that an expert may choose, Q parts (GPUs or nodes).
"""

import heapq
import itertools
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import Plan
from ..contract.problem import Problem
from .figures import TOLERANCE
from .objective import linear_weights

Float = NDArray[np.float64]
Flags = NDArray[np.bool_]
MOST_STEPS = 20_000  # of all layers of a plan: seconds of one core
MOST_CHOICES = 256  # sets of GPUs that an expert may choose from: 8 GPUs with copies, 256 without
MOST_SETS = 2000  # distinct token sets of a layer


@dataclass(frozen=True, kw_only=True)
class Searched:
    """What the search of some layers found.

    Args:
        proved_L: a bound of each layer, at most what was claimed.
        fault: the sentence about a layer in which a plan lies below the claim; empty if there is none.
    """

    proved_L: Float
    fault: str = ""


def search_layers(plan: Plan, problem: Problem, name: str, claimed_L: Float, proved_L: Float) -> Searched:
    """Raise the bounds of layers that are claimed to be higher than what the data prove, as far as the limits allow.

    Args:
        plan: its machines, slots and rule of dispatch count.
        problem, name: the data, and the objective as the certificate bears it.
        claimed_L, proved_L: bounds of each layer.
    """
    weights, found_L, steps = linear_weights(name, plan.cluster), proved_L.copy(), MOST_STEPS
    is_known = weights is not None and plan.dispatch == "uniform" and plan.experts_per_layer is None
    for layer in np.argsort(claimed_L - proved_L, kind="stable").tolist() if is_known else ():
        if claimed_L[layer] <= proved_L[layer] * (1 + TOLERANCE):
            continue
        search = _layer(plan, problem, layer, weights)
        if search is None:
            continue
        value, is_plan, used = search.least(float(claimed_L[layer]) * (1 - TOLERANCE), steps)
        steps -= used
        if is_plan:
            where = f"layer {plan.layer_ids[layer]}"
            wrong = f"{where}: a plan of {value} lies below the claimed bound of {claimed_L[layer]}"
            return Searched(proved_L=found_L, fault=wrong)
        is_reached = value >= claimed_L[layer] * (1 - TOLERANCE)
        found_L[layer] = claimed_L[layer] if is_reached else max(value, proved_L[layer])
    return Searched(proved_L=found_L)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Parts:
    """One kind of parts that tokens touch: their price, which GPUs are of which, and the token sets."""

    weight: float
    of_GQ: Flags
    member_BE: Flags
    share_B: Float


@dataclass(frozen=True, kw_only=True, eq=False)
class _Search:
    """A layer to be searched; loads are imbalances: of expert e alone on GPU g it is load_WE[:, e] * factor_G[g]."""

    level: float
    load_WE: Float
    factor_G: Float
    slots: int
    choice_OG: Flags
    alike_G: list[int]
    parts: tuple[_Parts, ...]
    order: list[int]

    def least(self, target: float, most: int) -> tuple[float, bool, int]:
        """The least value below the target and whether it is a plan's; without any, the target. And steps used."""
        heap: list[tuple[float, int, tuple[int, ...]]] = [(0.0, 0, ())]
        for step in range(most):
            if not heap or heap[0][0] >= target:
                return target, False, step
            bound, _, chosen = heapq.heappop(heap)
            if len(chosen) == len(self.order):
                return bound, True, step
            for option, value in self._children(chosen):
                if value < target:
                    heapq.heappush(heap, (max(bound, value), -len(chosen), (*chosen, option)))
        return min(heap[0][0], target) if heap else target, False, most

    def _children(self, chosen: tuple[int, ...]) -> list[tuple[int, float]]:
        """Sets of GPUs of the next expert, each with the bound of what follows."""
        done, expert = self.order[: len(chosen)], self.order[len(chosen)]
        rest = self.order[len(chosen) + 1 :]
        on_EG = np.zeros((self.load_WE.shape[1], len(self.factor_G)), bool)
        on_EG[done] = self.choice_OG[list(chosen)]
        free_G = self.slots - on_EG.sum(axis=0)
        option_O = np.array([o for o in self._allowed(free_G, len(rest)) if self._is_first(o, free_G)], np.int64)
        if not len(option_O):
            return []
        new_OG = self.choice_OG[option_O]
        share_EG = on_EG / np.maximum(on_EG.sum(axis=1, keepdims=True), 1)
        load_WG = self.load_WE @ share_EG
        part_OG = new_OG / new_OG.sum(axis=1, keepdims=True)
        load_OWG = load_WG + self.load_WE[:, expert][None, :, None] * part_OG[:, None]
        least_OW = self._carried_OW(load_OWG, free_G - new_OG, rest)
        value_O = self.level * np.maximum((load_OWG * self.factor_G).max(axis=2), least_OW).max(axis=1)
        for part in self.parts:
            value_O += part.weight * self._touched_O(part, on_EG, new_OG, expert, rest)
        return list(zip(option_O.tolist(), value_O.tolist(), strict=True))

    def _allowed(self, free_G: NDArray[np.int64], rest: int) -> list[int]:
        """Sets that fit, and leave the other experts enough slots and no slot that they could not fill."""
        left_OG = free_G - self.choice_OG
        left_O = left_OG.sum(axis=1)
        return [
            int(o)
            for o in np.flatnonzero((left_OG >= 0).all(axis=1) & (left_OG <= rest).all(axis=1) & (left_O >= rest))
        ]

    def _is_first(self, option: int, free_G: NDArray[np.int64]) -> bool:
        """Of GPUs that are empty and alike, a set takes the first ones."""
        skipped = set()
        for gpu, (free, alike) in enumerate(zip(free_G.tolist(), self.alike_G, strict=True)):
            if free == self.slots:
                if self.choice_OG[option, gpu] and alike in skipped:
                    return False
                if not self.choice_OG[option, gpu]:
                    skipped.add(alike)
        return True

    def _carried_OW(self, load_OWG: Float, free_OG: NDArray[np.int64], rest: list[int]) -> Float:
        """Least fullest GPU: for any set of GPUs, all others together carry what these cannot."""
        falling_WE = -np.sort(-self.load_WE[:, rest], axis=1)
        most_WE = np.concatenate([np.zeros((len(falling_WE), 1)), np.cumsum(falling_WE, axis=1)], axis=1)
        most_OWG = load_OWG + most_WE[:, free_OG].swapaxes(0, 1)
        order_OWG = np.argsort(most_OWG * self.factor_G, axis=2)
        rising_OWG = np.take_along_axis(most_OWG, order_OWG, axis=2)
        part_OWG = (1 / self.factor_G)[order_OWG]
        carried_OWG = self.load_WE.sum(axis=1)[:, None] - np.cumsum(rising_OWG, axis=2) + rising_OWG
        able_OWG = 1 - np.cumsum(part_OWG, axis=2) + part_OWG
        return np.asarray((carried_OWG / np.maximum(able_OWG, 1e-300)).max(axis=2))

    def _touched_O(self, part: _Parts, on_EG: Flags, new_OG: Flags, expert: int, rest: list[int]) -> Float:
        """Mean parts that a token touches: by the experts placed, and at least by the rest."""
        on_EQ, new_OQ = (on_EG.astype(float) @ part.of_GQ) > 0, (new_OG.astype(float) @ part.of_GQ) > 0
        touched_BQ = (part.member_BE.astype(float) @ on_EQ) > 0
        touched_OBQ = touched_BQ | (part.member_BE[:, expert, None] & new_OQ[:, None])
        known_O = touched_OBQ.sum(axis=2) @ part.share_B
        rest_BR = part.member_BE[:, rest]
        weight_BR = rest_BR * (part.share_B / np.maximum(rest_BR.sum(axis=1), 1))[:, None]
        further_ORP = weight_BR.T @ ~touched_OBQ
        return np.asarray(known_O + further_ORP.min(axis=2).sum(axis=1))


def _layer(plan: Plan, problem: Problem, layer: int, weights: tuple[float, float, float] | None) -> _Search | None:
    """The search of a layer; None if it is too large, or tokens that it needs are missing."""
    assert weights is not None
    level, fan, node = weights
    cluster, gpus, copies = plan.cluster, plan.cluster.num_gpus, plan.num_slots > plan.num_experts
    traces = [scenario.trace for scenario in problem.scenarios]
    if (2**gpus if copies else gpus) > MOST_CHOICES or ((fan or node) and (copies or len(traces) > 1)):
        return None
    sizes = range(1, gpus + 1) if copies else (1,)
    sets = [chosen for size in sizes for chosen in itertools.combinations(range(gpus), size)]
    choice_OG = np.zeros((len(sets), gpus), bool)
    for number, chosen in enumerate(sets):
        choice_OG[number, list(chosen)] = True
    loads = [scenario.load_LE[layer] for scenario in problem.scenarios]
    load_WE = np.array([load_E / max(load_E.sum(), 1e-300) for load_E in loads])
    parts: list[_Parts] = []
    if fan or node:
        if traces[0] is None:
            return None
        member_BE, share_B = _token_sets(traces[0].expert_TLK[:, layer], plan.num_experts)
        if len(share_B) > MOST_SETS:
            return None
        of_nodes = np.eye(cluster.num_nodes, dtype=bool)[cluster.node_G]
        kinds = ((fan, np.eye(gpus, dtype=bool)), (node, of_nodes))
        parts = [_Parts(weight=w, of_GQ=of, member_BE=member_BE, share_B=share_B) for w, of in kinds if w]
    keys = [(speed, at if node else 0) for speed, at in zip(cluster.speed_G.tolist(), cluster.node_G, strict=True)]
    return _Search(
        level=level,
        load_WE=load_WE,
        factor_G=cluster.speed_G.sum() / cluster.speed_G,
        slots=plan.slots_per_gpu,
        choice_OG=choice_OG,
        alike_G=[keys.index(key) for key in keys],
        parts=tuple(parts),
        order=np.argsort(-load_WE.max(axis=0), kind="stable").tolist(),
    )


def _token_sets(chosen_TK: NDArray[np.integer], experts: int) -> tuple[Flags, Float]:
    """Distinct sets of experts, and the share of tokens that have each."""
    count = Counter(frozenset(expert for expert in row if expert >= 0) for row in chosen_TK.tolist())
    count.pop(frozenset(), None)
    member_BE = np.zeros((len(count), experts), bool)
    for number, members in enumerate(count):
        member_BE[number, list(members)] = True
    return member_BE, np.array(list(count.values()), np.float64) / max(count.total(), 1)
