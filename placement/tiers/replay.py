"""A plan replayed batch by batch: seconds of every step, and what a cache in host memory makes of the SSD reads.

The model's seconds are a maximum of means; a step waits for its own slowest chain, so the mean of the steps is more.
With `cached`, host memory is what the runtime makes of it: as many slots per layer and node as the plan has experts in
that host memory, filled with those experts at first, then a least-recently-used cache of all that is not on a GPU.

Shapes: A batches, L layers, E experts, C kinds of cost, Y ways, H chains, M nodes.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..contract.plan import Plan
from ..contract.problem import Problem
from ..data.batches import count_rows_AE, decode_batches, spread, traffic_batches
from .layout import ways_of_plan
from .model import TierModel, seconds_of
from .ways import TRAFFIC, WORK

Float = NDArray[np.float64]
Integer = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """What the steps take.

    Args:
        seconds_A: of each batch, over all layers.
        hit_rate: uses of experts off the GPUs that were found in host memory; 1 if there were none.
        tokens: of one batch.
    """

    seconds_A: Float
    hit_rate: float
    tokens: int

    @property
    def mean_s(self) -> float:
        """Mean seconds of a step."""
        return float(self.seconds_A.mean())

    @property
    def p95_s(self) -> float:
        """Seconds that 95 % of the steps do not exceed."""
        return float(np.percentile(self.seconds_A, 95))

    @property
    def tokens_per_s(self) -> float:
        """Over all GPUs, if experts were all that a step consists of."""
        return self.tokens / self.mean_s if self.mean_s > 0 else float("inf")


def replay(
    problem: Problem, plan: Plan, model: TierModel, *, kind: str = "decode", cached: bool = False, most: int = 500
) -> Replayed:
    """Replay the first scenario's trace.

    Args:
        problem: its first scenario has a trace.
        plan: every expert has one home.
        model: of the plan's cluster and sizes.
        kind: `decode`, steps of `tiers.batch` lanes; or `chunk`, of `tiers.chunk` consecutive tokens.
        cached: host memory as a cache, see above; else experts stay at home and those on SSD are read for each use.
        most: batches; evenly spaced, or with a cache the first ones, because a cache remembers.

    Raises:
        ValueError: if there is no trace, or `tiers.chunk` is missing for chunks.
    """
    trace, tiers = problem.scenarios[0].trace, plan.cluster.tiers
    tokens = tiers.batch if kind == "decode" else tiers.chunk
    if trace is None or tokens is None:
        raise ValueError("a replay needs a routing trace, and tiers.chunk in the cluster file for chunks")
    batch_AT = (decode_batches if kind == "decode" else traffic_batches)(trace, tokens)
    batch_AT = batch_AT[:most] if cached else spread(batch_AT, most)
    way_LE, seconds_A, found, asked = ways_of_plan(model, plan), np.zeros(len(batch_AT)), 0, 0
    for layer in range(plan.num_layers):
        rows_AE = count_rows_AE(trace, batch_AT, layer)
        way_AE = np.broadcast_to(way_LE[layer], rows_AE.shape)
        if cached:
            way_AE = _with_cache(model, way_LE[layer], rows_AE > 0)
        lower_AE = (rows_AE > 0) & np.isin(way_AE, _ways_of(model, "host", "ssd"))
        asked += int(lower_AE.sum())
        found += int((lower_AE & np.isin(way_AE, _ways_of(model, "host"))).sum())
        seconds_A += _layer_seconds_A(problem, model, layer, rows_AE, way_AE)
    return Replayed(seconds_A=seconds_A, hit_rate=found / asked if asked else 1.0, tokens=tokens)


def _ways_of(model: TierModel, *places: str) -> list[int]:
    return [number for number, way in enumerate(model.ways.ways) if way.place in places]


def _layer_seconds_A(problem: Problem, model: TierModel, layer: int, rows_AE: Integer, way_AE: Integer) -> Float:
    ways = model.ways
    load_AH = np.zeros((len(rows_AE), len(ways.group_H)))
    for kind, (name, index) in enumerate(ways.kinds):
        cost_AE = seconds_of(problem.cluster, name, index, rows_AE.astype(np.float64), float(model.bytes_L[layer]))
        for y in np.unique(way_AE).tolist():
            if ways.use_YHC[y, :, kind].any():
                load_AH += (cost_AE * (way_AE == y)).sum(axis=1)[:, None] * ways.use_YHC[y, :, kind]
    groups = (ways.group_H == WORK, ways.group_H == TRAFFIC)
    return np.asarray(sum(load_AH[:, mine].max(axis=1, initial=0.0) for mine in groups))


def _with_cache(model: TierModel, way_E: Integer, used_AE: NDArray[np.bool_]) -> Integer:
    """Way of each expert in each batch when every node's host memory is an LRU cache of what is not on its GPUs."""
    ways = model.ways.ways
    way_AE = np.repeat(way_E[None], len(used_AE), axis=0)
    node_E = np.array([-1 if ways[y].place == "gpu" else ways[y].index for y in way_E])
    for node in np.unique(node_E[node_E >= 0]).tolist():
        mine = np.flatnonzero(node_E == node)
        in_host = {int(e): int(way_E[e]) for e in mine if ways[way_E[e]].place == "host"}
        twins = _twins(model, node)
        cache, slots = OrderedDict.fromkeys(in_host), len(in_host)
        for batch, row in enumerate(used_AE):
            touched = mine[row[mine]].tolist()
            for expert in touched:
                way = int(way_E[expert])
                way_AE[batch, expert] = twins[way][0 if expert in cache else 1]
            for expert in touched:
                cache.pop(expert, None)
                cache[expert] = None
            while len(cache) > slots:
                cache.popitem(last=False)
    return way_AE


def _twins(model: TierModel, node: int) -> dict[int, tuple[int, int]]:
    """For each way below the GPUs of a node: the same way out of host memory, and from SSD."""
    ways = model.ways.ways
    of = {(way.place, way.streamed): y for y, way in enumerate(ways) if way.place != "gpu" and way.index == node}
    return {y: (of.get(("host", streamed), y), of.get(("ssd", streamed), y)) for (place, streamed), y in of.items()}
