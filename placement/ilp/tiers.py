"""The integer programme of homes in tiers: all layers together, or some of them while the others stay.

x[l,e,y] = 1 if expert e of layer l is served by way y; s[w,l,g] seconds of the largest chain of group g.
minimise  sum_w weight_w sum_l,g s[w,l,g] + sum_u price_u bytes in pool u
with      sum_y x[l,e,y] = 1,   sum of bytes in pool u <= room_u,
          s[w,l,group of h] >= sum_e,y cost[w,l,e,y,h] x[l,e,y].
Shapes: W scenarios, L layers, E experts, Y ways, H chains, U memory pools.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pulp  # type: ignore[import-untyped]
from numpy.typing import NDArray

from ..tiers.model import TierModel
from ..tiers.ways import TRAFFIC, WORK
from .run import MilpResult, solve_milp

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
GAP = 1e-5  # relative gap at which a programme counts as solved; certificates call 1e-4 proven


def num_binaries(model: TierModel, layers: Sequence[int]) -> int:
    """Size of the programme of those layers."""
    return int(model.experts_L[list(layers)].sum()) * model.shape[2]


def solve_tiers(
    model: TierModel,
    layers: Sequence[int],
    room_U: Float,
    start_LE: Integer,
    *,
    time_limit_s: float,
    price_U: Float | None = None,
) -> tuple[Integer, MilpResult]:
    """Homes of the experts of some layers.

    Args:
        model: costs of all layers.
        layers: which are free.
        room_U: bytes that those layers may use in each pool; inf where it does not matter.
        start_LE: homes of all layers; those of the free ones start the programme.
        time_limit_s: wall seconds, after which the best homes so far are returned.
        price_U: seconds per byte in each pool, added to the objective; None is 0.

    Returns:
        Homes of all layers, and what the solver says; its bound is for the free layers, prices included.
    """
    deadline = time.monotonic() + time_limit_s
    model, unit_s = _scaled(model, start_LE)
    programme = pulp.LpProblem("tiers", pulp.LpMinimize)
    columns = {layer: _columns(programme, model, layer) for layer in layers}
    terms = [term for layer in layers for term in _seconds(programme, model, layer, columns[layer])]
    price_Y = np.zeros(model.shape[2]) if price_U is None else price_U[model.ways.pool_Y] / unit_s
    for layer in layers:
        terms += [(column, float(price_Y[y] * model.bytes_L[layer])) for (_, y), column in columns[layer].items()]
    programme += pulp.LpAffineExpression(terms)
    _rooms(programme, model, columns, room_U)
    start = _start(model, layers, start_LE)
    result = solve_milp(programme, time_limit_s=deadline - time.monotonic(), gap_rel=GAP, start=start)
    way_LE = start_LE.copy()
    if result.values is not None:
        for layer in layers:
            for (e, y), column in columns[layer].items():
                if result.values[column.name] > 0.5:
                    way_LE[layer, e] = y
    return way_LE, replace(result, objective=result.objective * unit_s, bound=result.bound * unit_s)


def _scaled(model: TierModel, way_LE: Integer) -> tuple[TierModel, float]:
    """The model in units of its mean layer: the solver's tolerances are absolute, and steps take microseconds."""
    unit_s = model.seconds(way_LE) / len(way_LE) or 1.0
    return replace(model, cost_WLEC=model.cost_WLEC / unit_s), unit_s


def _columns(programme: pulp.LpProblem, model: TierModel, layer: int) -> dict[tuple[int, int], pulp.LpVariable]:
    real, ways = range(int(model.experts_L[layer])), range(model.shape[2])
    columns = {(e, y): programme.add_variable(_x(layer, e, y), cat="Binary") for e in real for y in ways}
    for e in real:
        programme += pulp.LpAffineExpression([(columns[e, y], 1) for y in ways]) == 1
    return columns


def _seconds(
    programme: pulp.LpProblem, model: TierModel, layer: int, columns: dict[tuple[int, int], pulp.LpVariable]
) -> list[tuple[pulp.LpVariable, float]]:
    """The layer's seconds with their weights; each is at least every chain of its group."""
    cost_WEYH, group_H = model.chain_costs_WEYH(layer), model.ways.group_H
    terms = []
    for w, weight in enumerate(model.weight_W.tolist()):
        for group in (WORK, TRAFFIC):
            if not (group_H == group).any() or not weight:
                continue
            largest = programme.add_variable(_s(w, layer, group), lowBound=0)
            terms.append((largest, weight))
            for h in np.flatnonzero(group_H == group).tolist():
                load = [(column, float(cost_WEYH[w, e, y, h])) for (e, y), column in columns.items()]
                load = [(column, cost) for column, cost in load if cost]
                if load:
                    programme += pulp.LpAffineExpression([*load, (largest, -1)]) <= 0
    return terms


def _rooms(
    programme: pulp.LpProblem,
    model: TierModel,
    columns: dict[int, dict[tuple[int, int], pulp.LpVariable]],
    room_U: Float,
) -> None:
    """No pool is fuller than its room; in units of the largest expert, so that the numbers are small."""
    unit = float(model.bytes_L.max())
    for pool, room in enumerate(room_U.tolist()):
        if np.isfinite(room):
            used = [
                (column, float(model.bytes_L[layer] / unit))
                for layer, own in columns.items()
                for (_, y), column in own.items()
                if model.ways.pool_Y[y] == pool
            ]
            programme += pulp.LpAffineExpression(used) <= room / unit * (1 + 1e-12)


def _start(model: TierModel, layers: Sequence[int], way_LE: Integer) -> dict[str, float]:
    values = {}
    load_LWH, group_H = model.load_LWH(way_LE), model.ways.group_H
    for layer in layers:
        for e in range(int(model.experts_L[layer])):
            values[_x(layer, e, int(way_LE[layer, e]))] = 1.0
        for w in range(len(model.weight_W)):
            for group in (WORK, TRAFFIC):
                values[_s(w, layer, group)] = float(load_LWH[layer, w, group_H == group].max(initial=0.0))
    return values


def _x(layer: int, e: int, y: int) -> str:
    return f"x_{layer}_{e}_{y}"


def _s(w: int, layer: int, group: int) -> str:
    return f"s_{w}_{layer}_{group}"
