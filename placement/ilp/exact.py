"""Our exact integer programme, one layer at a time, for any objective that layers do not share.

Variables: z[e,r,g] = expert e has r copies and one of them is on GPU g (r copies of equal share); f[b,g] >= x[e,g] says
that bundle b touches GPU g, x = sum_r z; M is the fullest GPU. With one copy per expert z is just x[e,g].
minimise  fan * sum_b c_b sum_g f[b,g] / tokens  +  node * (same with nodes)  +  level * M.
Symmetry: equal GPUs of one node are interchangeable, so the heaviest experts are fixed to the first GPUs in turn.
Shapes: W scenarios, E experts, G GPUs, M nodes, S slots per GPU, B bundles.
"""

from dataclasses import dataclass

import numpy as np
import pulp  # type: ignore[import-untyped]
from numpy.typing import NDArray

from ..data.bundles import Bundles
from .run import MilpResult, SolverName, solve_milp

Float = NDArray[np.float64]
Integer = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerModel:
    """What one layer's programme is about.

    Args:
        weight_WE: load of each expert, each scenario summing to 1.
        speed_G: relative speed of each GPU, positive; GPUs of equal speed are interchangeable.
        node_G: node of each GPU.
        slots_per_gpu: S: every GPU holds exactly so many copies.
        level: weight of the fullest GPU over the mean one.
        least_peak: the fullest GPU counts at least as that, as where other GPUs are fixed.
        bundles: token sets, needed if `fan` or `node` is positive.
        fan, node: weights of mean GPU and node fan-out.
    """

    weight_WE: Float
    speed_G: Float
    node_G: Integer
    slots_per_gpu: int
    level: float = 1.0
    least_peak: float = 0.0
    bundles: Bundles | None = None
    fan: float = 0.0
    node: float = 0.0

    @property
    def num_binaries(self) -> int:
        """E * G * largest copy count: the size of the programme."""
        E, G = self.weight_WE.shape[1], len(self.speed_G)
        return E * G * self.max_copies

    @property
    def max_copies(self) -> int:
        """Copies that one expert may have: one per GPU, and one slot is left for every other expert."""
        return min(len(self.speed_G), len(self.speed_G) * self.slots_per_gpu - self.weight_WE.shape[1] + 1)


def solve_layer(
    model: LayerModel, *, time_limit_s: float, start_P: Integer | None = None, solver: SolverName = "highs"
) -> tuple[Integer | None, MilpResult]:
    """Solve one layer.

    Args:
        model: loads, machines and weights of the layer.
        time_limit_s: seconds after which the best map so far is returned.
        start_P: a known map of the layer to start from (slots GPU by GPU).
        solver: `highs`, or `cbc` where its program is installed.

    Returns:
        The map of the layer (slots GPU by GPU), or None if nothing was found, and what the solver says.

    Raises:
        ValueError: if the objective has no linear form here (fan-out with replicas).
    """
    if model.max_copies > 1 and (model.fan or model.node):
        raise ValueError("the exact programme knows fan-out only without replicas; use --solver search")
    programme, z = _build(model)
    start = None if start_P is None else _start_values(model, _relabelled(model, start_P))
    result = solve_milp(programme, time_limit_s=time_limit_s, start=start, solver=solver)
    if result.values is None:
        return None, result
    chosen = [(g, e) for (e, _, g), variable in z.items() if result.values[variable.name] > 0.5]
    return np.array([e for _, e in sorted(chosen)], np.int64), result


def _build(model: LayerModel) -> tuple[pulp.LpProblem, dict[tuple[int, int, int], pulp.LpVariable]]:
    E, G, S = model.weight_WE.shape[1], len(model.speed_G), model.slots_per_gpu
    copies = range(1, model.max_copies + 1)
    programme = pulp.LpProblem("layer", pulp.LpMinimize)
    z = {
        (e, r, g): programme.add_variable(f"z_{e}_{r}_{g}", cat="Binary")
        for e in range(E)
        for r in copies
        for g in range(G)
    }
    peak = programme.add_variable("peak", lowBound=model.least_peak)
    terms = [(peak, model.level), *_fanout_terms(model, programme, z)]
    programme += pulp.LpAffineExpression(terms)
    for e in range(E):
        _one_count(programme, e, z, copies, G)
    for g in range(G):
        programme += pulp.LpAffineExpression([(z[e, r, g], 1) for e in range(E) for r in copies]) == S
        for weight_E in model.weight_WE:
            factor = model.speed_G.sum() / model.speed_G[g]
            load = [(z[e, r, g], float(weight_E[e]) / r * factor) for e in range(E) for r in copies]
            programme += pulp.LpAffineExpression([*load, (peak, -1)]) <= 0
    if _gpus_are_alike(model):
        _break_symmetry(model, z)
    return programme, z


def _one_count(
    programme: pulp.LpProblem, e: int, z: dict[tuple[int, int, int], pulp.LpVariable], copies: range, G: int
) -> None:
    """Expert e has exactly one copy count r, and r copies if so."""
    if len(copies) == 1:
        programme += pulp.LpAffineExpression([(z[e, 1, g], 1) for g in range(G)]) == 1
        return
    has = {r: programme.add_variable(f"y_{e}_{r}", cat="Binary") for r in copies}
    programme += pulp.LpAffineExpression([(variable, 1) for variable in has.values()]) == 1
    for r in copies:
        programme += pulp.LpAffineExpression([(z[e, r, g], 1) for g in range(G)] + [(has[r], -r)]) == 0


def _fanout_terms(
    model: LayerModel, programme: pulp.LpProblem, z: dict[tuple[int, int, int], pulp.LpVariable]
) -> list[tuple[pulp.LpVariable, float]]:
    if model.bundles is None or not (model.fan or model.node):
        return []
    terms = []
    for weight, part_G, letter in (
        (model.fan, np.arange(len(model.node_G)), "f"),
        (model.node, model.node_G, "n"),
    ):
        if weight:
            terms += _touch_terms(model.bundles, programme, z, weight, part_G, letter)
    return terms


def _touch_terms(
    bundles: Bundles,
    programme: pulp.LpProblem,
    z: dict[tuple[int, int, int], pulp.LpVariable],
    weight: float,
    part_G: Integer,
    letter: str,
) -> list[tuple[pulp.LpVariable, float]]:
    members = [np.flatnonzero(part_G == part).tolist() for part in range(int(part_G[-1]) + 1)]
    terms = []
    for b, (items, count) in enumerate(zip(bundles.item_BK.tolist(), bundles.count_B.tolist(), strict=True)):
        for part, gpus in enumerate(members):
            touched = programme.add_variable(f"{letter}_{b}_{part}", lowBound=0, upBound=1)
            terms.append((touched, weight * count / bundles.tokens))
            for e in items:
                if e >= 0:
                    programme += pulp.LpAffineExpression([(touched, 1)] + [(z[e, 1, g], -1) for g in gpus]) >= 0
    return terms


def _gpus_are_alike(model: LayerModel) -> bool:
    nodes_matter = bool(model.node) and model.node_G[-1] > 0
    return model.max_copies == 1 and bool(np.all(model.speed_G == model.speed_G[0])) and not nodes_matter


def _heaviest_first(model: LayerModel) -> list[int]:
    return [int(e) for e in np.argsort(-model.weight_WE.max(axis=0), kind="stable")]


def _break_symmetry(model: LayerModel, z: dict[tuple[int, int, int], pulp.LpVariable]) -> None:
    """GPUs can be numbered in the order in which the experts, heaviest first, come to them."""
    for rank, e in enumerate(_heaviest_first(model)[: len(model.speed_G)]):
        for g in range(rank + 1, len(model.speed_G)):
            z[e, 1, g].upBound = 0


def _relabelled(model: LayerModel, start_P: Integer) -> Integer:
    """The same map with GPUs numbered as `_break_symmetry` wants them."""
    if not _gpus_are_alike(model):
        return start_P
    by_gpu = start_P.reshape(len(model.speed_G), -1)
    gpu_E = np.empty(start_P.size, np.int64)
    gpu_E[start_P] = np.arange(len(start_P)) // by_gpu.shape[1]
    order = list(dict.fromkeys(gpu_E[_heaviest_first(model)].tolist()))
    return np.asarray(by_gpu[order].reshape(-1))


def _start_values(model: LayerModel, start_P: Integer) -> dict[str, float]:
    count_E = np.bincount(start_P, minlength=model.weight_WE.shape[1])
    gpu_P = np.arange(len(start_P)) // model.slots_per_gpu
    pairs = set(zip(start_P.tolist(), gpu_P.tolist(), strict=True))
    if len(pairs) < len(start_P):
        return {}
    values = {f"z_{e}_{count_E[e]}_{g}": 1.0 for e, g in pairs}
    if model.max_copies > 1:
        values |= {f"y_{e}_{count}": 1.0 for e, count in enumerate(count_E.tolist())}
    share_WP = model.weight_WE[:, start_P] / count_E[start_P]
    load_WG = share_WP.reshape(len(share_WP), len(model.speed_G), -1).sum(axis=2)
    values["peak"] = max(model.least_peak, float((load_WG * model.speed_G.sum() / model.speed_G).max()))
    if model.bundles is not None and (model.fan or model.node):
        values |= _start_touched(model, start_P, gpu_P)
    return values


def _start_touched(model: LayerModel, start_P: Integer, gpu_P: Integer) -> dict[str, float]:
    assert model.bundles is not None
    gpu_E = np.empty(model.weight_WE.shape[1], np.int64)
    gpu_E[start_P] = gpu_P
    values: dict[str, float] = {}
    for b, items in enumerate(model.bundles.item_BK.tolist()):
        gpus = {int(gpu_E[e]) for e in items if e >= 0}
        values |= {f"f_{b}_{g}": 1.0 for g in gpus} if model.fan else {}
        values |= {f"n_{b}_{model.node_G[g]}": 1.0 for g in gpus} if model.node else {}
    return values
