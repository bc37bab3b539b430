"""What the checker of tiers knows of bounds: what stored multipliers prove, and what a search of its own adds.

Sums alone give the first part. With prices lambda of memory and weights mu of chains, no plan takes less than

    sum over experts of min over homes of (sum over chains of mu cost + lambda bytes) - sum over pools of lambda room.

The second part keeps the prices and drops the weights: the least seconds plus priced bytes of a whole layer are at
least the layer's part of that sum, and are found by trying homes expert by expert. Where room is left between such
minima and a claim, all layers' divisions below it are joined by the bytes that they use: one fits, or the claim holds.
Each step keeps at most so many divisions; of those that it drops it remembers the least bound, so it never claims more.

Shapes: N divisions, W scenarios, L layers, E experts, Y ways, H chains, U memory pools.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract.certificate import Certificate
from ..contract.plan import Plan
from .costs import DeviceCosts, Home, busy_devices, expert_sizes
from .figures import TOLERANCE, Figure, compared, in_part, is_above, not_derived
from .homes import homes_of_layer, pool_name, possible_homes, usable_room

Float = NDArray[np.float64]
Integer = NDArray[np.int64]
Steps = list[tuple[str, float, DeviceCosts]]
WIDTHS = (64, 4096)  # divisions of a layer that are kept at each expert, fewer where layers are many or large
MOST_CELLS = 1 << 28  # numbers that a pass over all layers writes: seconds of one core
MOST_JOINED = 200_000  # divisions of all layers that are kept at each layer


def bound_figures(plan: Plan, steps: Steps, certificate: Certificate, *, searches: bool) -> list[Figure]:
    """The bound of a certificate, and what it says that multipliers alone prove; the search takes seconds."""
    claimed, seconds = certificate.bound, certificate.objective
    if claimed is None:
        return [not_derived("bound", None, "there is none")]
    if is_above(claimed, seconds):
        wrong = f"the bound {claimed} lies above the objective {seconds}"
        return [Figure(name="bound", claimed=claimed, faults=(wrong,))]
    if faults := _multiplier_faults(plan, steps, certificate.dual):
        return [Figure(name="bound", claimed=claimed, faults=faults)]
    tables = _tables(plan, steps, certificate.dual)
    priced = _priced_rooms(tables[0])
    by_sums = sum(table.least for table in tables) - priced
    figures = []
    if certificate.data_bound is not None:
        figures.append(compared("bound by multipliers alone", certificate.data_bound, min(by_sums, seconds)))
    if not is_above(claimed, by_sums):
        return [*figures, Figure(name="bound", claimed=claimed, derived=by_sums)]
    if "MIP dual" not in certificate.bound_name:
        wrong = f"the multipliers prove a bound of {by_sums}, the certificate claims {claimed}"
        return [*figures, Figure(name="bound", claimed=claimed, derived=by_sums, faults=(wrong,))]
    proved, below = _searched(tables, priced, claimed) if searches else (by_sums, None)
    if below is not None:
        wrong = f"a division of {below} s lies below the bound of {claimed} s"
        return [*figures, Figure(name="bound", claimed=claimed, derived=below, faults=(wrong,))]
    return [*figures, in_part("bound", claimed, max(proved, by_sums), "multipliers and search")]


def is_traffic(chain: str) -> bool:
    """Whether a chain carries rows rather than doing work."""
    return chain.startswith(("nvlink", "nic"))


def _multipliers(dual: dict[str, Any]) -> tuple[dict[str, float], dict[str, Float]]:
    """Prices of a byte of each memory, and weights of each chain in each step and layer."""
    prices = {str(name): float(price) for name, price in dual["bytes"].items()}
    return prices, {str(name): np.array(rows, np.float64) for name, rows in dual["chains"].items()}


def _multiplier_faults(plan: Plan, steps: Steps, dual: dict[str, Any]) -> tuple[str, ...]:
    """Why multipliers prove nothing: they must not be negative, nor sum to more than a step weighs."""
    try:
        prices, chains = _multipliers(dual)
        wrong = [
            n for n, rows in chains.items() if rows.shape != (len(steps), plan.num_layers) or not (rows >= 0).all()
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return ("the certificate's multipliers cannot be read",)
    if wrong or not all(price >= 0 and math.isfinite(price) for price in prices.values()):
        return ("the certificate's multipliers must be tables of numbers that are not negative",)
    for wanted in (False, True):
        tables = [rows for chain, rows in chains.items() if is_traffic(chain) == wanted]
        if tables and np.any(sum(tables) > np.array([[weight] for _, weight, _ in steps]) * (1 + TOLERANCE)):
            return ("the certificate's multipliers of a layer sum to more than the weight of its scenario",)
    return ()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Table:
    """One layer: what each expert adds to each chain in each home, and what its bytes cost at the stored prices.

    Args:
        cost_EYWH: seconds.
        reduced_EY: seconds weighted by the multipliers, plus priced bytes.
        byte_cost_Y: priced bytes of one expert.
        pool_YU: which pool a home is of.
        room_U, price_U: bytes of each pool, and seconds per byte.
        weight_W: how often each kind of step counts.
        traffic_H: which chains carry rows.
        now: the plan's own seconds plus priced bytes of the layer.
        size: bytes of one expert.
    """

    cost_EYWH: Float
    reduced_EY: Float
    byte_cost_Y: Float
    pool_YU: Float
    room_U: Float
    price_U: Float
    weight_W: Float
    traffic_H: NDArray[np.bool_]
    now: float
    size: float

    @property
    def least(self) -> float:
        """What the multipliers prove of the layer, before priced rooms are taken off."""
        return float(self.reduced_EY.min(axis=1).sum())

    def seconds_N(self, load_NWH: Float) -> Float:
        parts = [load_NWH[:, :, self.traffic_H == one].max(axis=2, initial=0.0) for one in (False, True)]
        return np.asarray((parts[0] + parts[1]) @ self.weight_W)


def _tables(plan: Plan, steps: Steps, dual: dict[str, Any]) -> list[_Table]:
    prices, weights = _multipliers(dual)
    homes = possible_homes(plan)
    pools = list(dict.fromkeys(pool_name(home) for home in homes))
    chains = list(dict.fromkeys(chain for home in homes for chain, *_ in busy_devices(plan.cluster, home)))
    room = {pool_name(home): usable_room(plan, home[0], home[1]) for home in homes}
    shared = {
        "pool_YU": np.array([[float(pool_name(home) == pool) for pool in pools] for home in homes]),
        "room_U": np.array([room[pool] for pool in pools]),
        "price_U": np.array([prices.get(pool, 0.0) for pool in pools]),
        "weight_W": np.array([weight for _, weight, _ in steps]),
        "traffic_H": np.array([is_traffic(chain) for chain in chains], bool),
    }
    found = []
    for layer, size in enumerate(expert_sizes(plan) or []):
        cost_EYWH = _costs(plan, steps, homes, chains, layer)
        mu_WH = np.array([[weights[c][w, layer] if c in weights else 0.0 for c in chains] for w in range(len(steps))])
        byte_cost_Y = shared["pool_YU"] @ shared["price_U"] * size
        table = _Table(
            cost_EYWH=cost_EYWH,
            reduced_EY=np.einsum("eywh,wh->ey", cost_EYWH, mu_WH) + byte_cost_Y,
            byte_cost_Y=byte_cost_Y,
            now=math.inf,
            size=size,
            **shared,
        )
        found.append(replace(table, now=_value_now(plan, table, homes, layer)))
    return found


def _costs(plan: Plan, steps: Steps, homes: list[Home], chains: list[str], layer: int) -> Float:
    real = int(plan.experts_L[layer])
    cost_EYWH = np.zeros((real, len(homes), len(steps), len(chains)))
    for y, home in enumerate(homes):
        for chain, device, index, share in busy_devices(plan.cluster, home):
            for w, (_, _, costs) in enumerate(steps):
                cost_EYWH[:, y, w, chains.index(chain)] += share * costs.of(layer, device, index)[:real]
    return cost_EYWH


def _value_now(plan: Plan, table: _Table, homes: list[Home], layer: int) -> float:
    """Seconds and priced bytes of the layer as the plan has it."""
    mine = homes_of_layer(plan, layer)
    way_E = np.array([homes.index(mine[expert][0]) for expert in range(len(table.cost_EYWH))])
    load_WH = table.cost_EYWH[np.arange(len(way_E)), way_E].sum(axis=0)
    return float(table.seconds_N(load_WH[None])[0] + table.byte_cost_Y[way_E].sum())


def _priced_rooms(table: _Table) -> float:
    priced = table.price_U > 0
    return float(table.price_U[priced] @ table.room_U[priced])


def _searched(tables: list[_Table], priced: float, claimed: float) -> tuple[float, float | None]:
    """A bound of up to `claimed` by search, and the seconds of a division below it if there is one."""
    cells = sum(table.cost_EYWH.size for table in tables)
    width = int(np.clip(MOST_CELLS // max(cells, 1), *WIDTHS))
    least_L = [_divisions(table, table.now, width).least for table in tables]
    proved = sum(least_L) - priced
    target = claimed * (1 - TOLERANCE)
    if proved >= target:
        return claimed, None
    room = target - proved
    layers = []
    for table, least in zip(tables, least_L, strict=True):
        found = _divisions(table, least + room, width)
        if found.is_cut:
            return proved, None
        layers.append(found)
    return _joined(tables, layers, least_L, priced, target, claimed, proved)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Divisions:
    """Divisions of a layer whose seconds plus priced bytes lie below a limit.

    Args:
        seconds_N, bytes_NU: of each.
        least: no division of the layer has less; at most the limit.
        is_cut: whether some were dropped, so that others may exist.
    """

    seconds_N: Float
    bytes_NU: Float
    least: float
    is_cut: bool


def _divisions(table: _Table, limit: float, width: int) -> _Divisions:
    """Try homes expert by expert, dearest first; what its bound puts at the limit or above is left out."""
    order = np.argsort(-table.cost_EYWH.max(axis=(1, 2, 3)), kind="stable")
    rest_D = np.append(np.cumsum(table.reduced_EY.min(axis=1)[order][::-1])[::-1], 0.0)
    cheapest = float(table.byte_cost_Y.min())
    load_NWH, bytes_NU = np.zeros((1, *table.cost_EYWH.shape[2:])), np.zeros((1, len(table.room_U)))
    reduced_N, dropped = np.zeros(1), math.inf
    for depth, expert in enumerate(order.tolist(), 1):
        parent_N, way_N = (part.ravel() for part in np.indices((len(load_NWH), table.pool_YU.shape[0])))
        fits_N = (bytes_NU[parent_N] + table.pool_YU[way_N] * table.size <= table.room_U * (1 + 1e-12)).all(axis=1)
        parent_N, way_N = parent_N[fits_N], way_N[fits_N]
        load_NWH = load_NWH[parent_N] + table.cost_EYWH[expert, way_N]
        bytes_NU = bytes_NU[parent_N] + table.pool_YU[way_N] * table.size
        reduced_N = reduced_N[parent_N] + table.reduced_EY[expert, way_N]
        known_N = table.seconds_N(load_NWH) + bytes_NU @ table.price_U + (len(order) - depth) * cheapest
        bound_N = np.maximum(reduced_N + rest_D[depth], known_N)
        kept_N = np.flatnonzero(bound_N < limit)
        if len(kept_N) > width:
            kept_N = kept_N[np.argsort(bound_N[kept_N], kind="stable")]
            dropped, kept_N = min(dropped, float(bound_N[kept_N[width]])), kept_N[:width]
        load_NWH, bytes_NU, reduced_N, known_N = load_NWH[kept_N], bytes_NU[kept_N], reduced_N[kept_N], known_N[kept_N]
    least = min(limit, dropped, float(known_N.min(initial=math.inf)))
    return _Divisions(
        seconds_N=table.seconds_N(load_NWH), bytes_NU=bytes_NU, least=least, is_cut=math.isfinite(dropped)
    )


def _joined(
    tables: list[_Table],
    layers: list[_Divisions],
    least_L: list[float],
    priced: float,
    target: float,
    claimed: float,
    proved: float,
) -> tuple[float, float | None]:
    """Join the divisions of all layers by the bytes that they use; of those of equal bytes the quickest is kept."""
    room_U, price_U = tables[0].room_U, tables[0].price_U
    seconds_N, bytes_NU = np.zeros(1), np.zeros((1, len(room_U)))
    for number, layer in enumerate(layers):
        if len(seconds_N) * len(layer.seconds_N) > MOST_JOINED:
            return proved, None
        seconds_N = (seconds_N[:, None] + layer.seconds_N).ravel()
        bytes_NU = (bytes_NU[:, None] + layer.bytes_NU).reshape(-1, len(room_U))
        bound_N = seconds_N + bytes_NU @ price_U + sum(least_L[number + 1 :]) - priced
        kept_N = np.flatnonzero((bytes_NU <= room_U * (1 + 1e-9)).all(axis=1) & (bound_N < target))
        kept_N = kept_N[np.argsort(seconds_N[kept_N], kind="stable")]
        kept_N = kept_N[np.unique(bytes_NU[kept_N], axis=0, return_index=True)[1]]
        seconds_N, bytes_NU = seconds_N[kept_N], bytes_NU[kept_N]
    below = float(seconds_N.min(initial=math.inf))
    return claimed, below if below < target else None
