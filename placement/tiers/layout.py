"""From ways to a plan file and back: slots of GPUs, homes below them.

Shapes: L layers, E experts, G GPUs, M nodes, P slots, W scenarios, H chains.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..contract.certificate import Certificate
from ..contract.homes import COMPUTED, STREAMED, Homes
from ..contract.plan import EMPTY, Plan
from ..contract.problem import Problem
from .model import TierModel
from .relaxation import Multipliers

Integer = NDArray[np.int64]
OBJECTIVE = "seconds"
KEPT_DIGITS = 12  # of loads in a plan, as in plans without tiers


def plan_of(problem: Problem, model: TierModel, way_LE: Integer, certificate: Certificate, solver: str) -> Plan:
    """The plan in which every expert is served by its way.

    Args:
        problem: what was placed; loads and names of its data go into the metadata.
        model: ways, and seconds of each scenario for the metadata.
        way_LE: way of each expert.
        certificate, solver: what the plan bears.
    """
    cluster = problem.cluster
    gpu_LE, homes = homes_of(model, way_LE, cluster.num_nodes)
    load_LE = problem.weight_WLE.mean(axis=0)
    return Plan(
        physical_to_logical_LP=_map_LP(gpu_LE, cluster.num_gpus),
        num_experts=problem.num_experts,
        cluster=cluster,
        layer_ids=problem.layer_ids,
        hidden_layers=problem.hidden_layers,
        dispatch=cluster.ep.dispatch,
        solver=solver,
        objective_name=OBJECTIVE,
        certificate=certificate,
        tier_LE=_tiers_LE(gpu_LE, homes) if cluster.num_nodes == 1 else None,
        homes=homes,
        experts_per_layer=problem.experts_per_layer,
        metadata={
            "load": [[float(f"{load:.{KEPT_DIGITS}g}") for load in row] for row in load_LE.tolist()],
            "planned_on": [scenario.name for scenario in problem.scenarios],
            "expert_bytes": model.bytes_L.tolist(),
            "seconds_per_step": scenario_seconds(model, way_LE),
        },
    )


def scenario_seconds(model: TierModel, way_LE: Integer) -> dict[str, float]:
    """Seconds of one step of each scenario."""
    load_LWH = model.load_LWH(way_LE)
    found = {}
    for w, name in enumerate(model.names_W):
        group_H = model.ways.group_H
        parts = [load_LWH[:, w, group_H == group].max(axis=1, initial=0.0).sum() for group in (0, 1)]
        found[name] = float(sum(parts))
    return found


def homes_of(model: TierModel, way_LE: Integer, nodes: int) -> tuple[Integer, Homes]:
    """GPU of each expert, -1 where it has none, and the homes below."""
    L, E = way_LE.shape
    gpu_LE = np.full((L, E), EMPTY)
    lower = {"host": np.zeros((L, E, nodes), np.int8), "ssd": np.zeros((L, E, nodes), np.int8)}
    real_LE = np.arange(E) < model.experts_L[:, None]
    for number, way in enumerate(model.ways.ways):
        mine_LE = (way_LE == number) & real_LE
        if way.place == "gpu":
            gpu_LE[mine_LE] = way.index
        else:
            lower[way.place][mine_LE, way.index] = STREAMED if way.streamed else COMPUTED
    return gpu_LE, Homes(host_LEM=lower["host"], ssd_LEM=lower["ssd"])


def ways_of_plan(model: TierModel, plan: Plan) -> Integer:
    """Way of each expert of a plan in which each has one home.

    Raises:
        ValueError: if an expert has no home, several, or one that the model's cluster does not have.
    """
    assert plan.homes is not None
    way_LE = np.full((plan.num_layers, plan.num_experts), EMPTY)
    homes_LE = np.zeros(way_LE.shape, np.int64)
    for number, way in enumerate(model.ways.ways):
        if way.place == "gpu":
            mine_LE = plan.copies_LEG[:, :, way.index] > 0
        else:
            code = STREAMED if way.streamed else COMPUTED
            mine_LE = (plan.homes.host_LEM if way.place == "host" else plan.homes.ssd_LEM)[:, :, way.index] == code
        way_LE[mine_LE] = number
        homes_LE += mine_LE
    real_LE = np.arange(plan.num_experts) < model.experts_L[:, None]
    if np.any(homes_LE[real_LE] != 1):
        layer, expert = np.argwhere((homes_LE != 1) & real_LE)[0].tolist()
        raise ValueError(
            f"expert {expert} of layer {plan.layer_ids[layer]} has {homes_LE[layer, expert]} homes that can serve it; "
            "expected one"
        )
    way_LE[~real_LE] = 0
    return way_LE


def named_multipliers(model: TierModel, multipliers: Multipliers) -> dict[str, Any]:
    """The multipliers by the names of what they price, as a certificate keeps them."""
    prices = zip(model.ways.pool_names, multipliers.price_U.tolist(), strict=True)
    chain_WLH = multipliers.chain_WLH
    chains = {
        name: chain_WLH[:, :, h].tolist() for h, name in enumerate(model.ways.chain_names) if chain_WLH[:, :, h].any()
    }
    return {"bytes": dict(prices), "chains": chains}


def _map_LP(gpu_LE: Integer, gpus: int) -> Integer:
    """Slots GPU by GPU, as many as the fullest GPU of any layer needs; the others end with empty ones."""
    per_gpu = max(1, max(int(np.bincount(row[row >= 0], minlength=1).max(initial=0)) for row in gpu_LE))
    map_LP = np.full((len(gpu_LE), gpus * per_gpu), EMPTY)
    for layer, gpu_E in enumerate(gpu_LE):
        for gpu in range(gpus):
            mine = np.flatnonzero(gpu_E == gpu)
            map_LP[layer, gpu * per_gpu : gpu * per_gpu + len(mine)] = mine
    return map_LP


def _tiers_LE(gpu_LE: Integer, homes: Homes) -> Integer:
    return np.where(gpu_LE >= 0, 0, np.where(homes.host_LEM.any(axis=2), 1, 2)).astype(np.int64)
