"""Independent checker of plans with tiers: homes, bytes, seconds and the bound, derived again.

Shares no code with the model, its search and its programmes on purpose. Shapes: E experts.
"""

import math
from collections import Counter, defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routing.ground.quantity import format_size

from ..contract.cluster import Cluster
from ..contract.plan import Plan
from ..contract.problem import Problem
from .check_costs import DeviceCosts, Home, busy_devices, expert_sizes, steps_of

Float = NDArray[np.float64]
TOLERANCE = 1e-6  # relative: sums of float64 in another order differ by less


def tier_faults(plan: Plan, made_from: Problem | None = None) -> list[str]:
    """Everything that is wrong with a plan that has homes below the GPUs; an empty list means that it may be written.

    Args:
        plan: read expert by expert.
        made_from: if given, what the certificate claims is computed again on it.
    """
    faults = _home_faults(plan) or _byte_faults(plan)
    if made_from is not None and not faults:
        faults = _fit_faults(plan, made_from) or _claim_faults(plan, made_from)
    return faults


def homes_of_layer(plan: Plan, layer: int) -> dict[int, list[Home]]:
    """Every home of every expert of a layer."""
    assert plan.homes is not None
    found: dict[int, list[Home]] = defaultdict(list)
    per_gpu = plan.slots_per_gpu
    for slot, expert in enumerate(plan.physical_to_logical_LP[layer].tolist()):
        if expert >= 0:
            found[expert].append(("gpu", slot // per_gpu, False))
    for place, table in (("host", plan.homes.host_LEM), ("ssd", plan.homes.ssd_LEM)):
        for expert, row in enumerate(table[layer].tolist()):
            found[expert] += [(place, node, code == 2) for node, code in enumerate(row) if code]
    return {expert: homes for expert, homes in found.items() if homes}


def _home_faults(plan: Plan) -> list[str]:
    faults = []
    for layer, real in enumerate(plan.experts_L.tolist()):
        homes = homes_of_layer(plan, layer)
        where = f"layer {plan.layer_ids[layer]}"
        if missing := [e for e in range(real) if e not in homes]:
            faults.append(f"{where}: experts {missing[:8]} have no home")
        if beyond := [e for e in homes if not 0 <= e < real]:
            faults.append(f"{where}: homes name experts {beyond[:8]} of {real}")
        if doubled := [e for e, places in homes.items() if len(places) > 1]:
            faults.append(f"{where}: experts {doubled[:8]} have several homes")
        if wrong := [e for e, places in homes.items() if not all(_is_possible(plan.cluster, one) for one in places)]:
            faults.append(f"{where}: experts {wrong[:8]} are served in a way that the cluster does not have")
    return faults


def _is_possible(cluster: Cluster, home: Home) -> bool:
    place, index, streamed = home
    if place == "gpu":
        return True
    allowed = cluster.tiers.cpu
    if cluster.tiers.gpu == "required":
        return False
    if streamed:
        return (allowed is None or allowed.stream) and cluster.pcie_bytes_per_s_M[index] > 0
    return (allowed is None or allowed.compute) and cluster.cpu_bytes_per_s_M[index] > 0


def _byte_faults(plan: Plan) -> list[str]:
    sizes = expert_sizes(plan)
    if sizes is None or len(sizes) != plan.num_layers:
        return [f"metadata: expert_bytes must give {plan.num_layers} sizes"]
    used: Counter[tuple[str, int]] = Counter()
    for layer, size in enumerate(sizes):
        for homes in homes_of_layer(plan, layer).values():
            for place, index, _ in homes:
                used[place, index] += size  # type: ignore[assignment]
    return [
        f"{place} {index} needs {format_size(need)} for its experts and has {format_size(room)}"
        for (place, index), need in sorted(used.items())
        if need > (room := _room(plan.cluster, place, index)) * (1 + 1e-9)
    ]


def _room(cluster: Cluster, place: str, index: int) -> float:
    rooms = {"gpu": cluster.memory_bytes_G, "host": cluster.dram_bytes_M, "ssd": cluster.ssd_bytes_M}
    return float(rooms[place][index])


def _fit_faults(plan: Plan, problem: Problem) -> list[str]:
    if (plan.num_layers, plan.num_experts) == (problem.num_layers, problem.num_experts):
        mine, given = plan.cluster.to_json(), problem.cluster.to_json()
        differ = sorted(name for name in mine.keys() | given.keys() if mine.get(name) != given.get(name))
        return [f"the plan's cluster differs from the problem's in {', '.join(differ)}"] if differ else []
    return [
        f"the plan is for {plan.num_layers} layers x {plan.num_experts} experts, "
        f"the data has {problem.num_layers} x {problem.num_experts}"
    ]


def _claim_faults(plan: Plan, problem: Problem) -> list[str]:
    certificate, faults = plan.certificate, []
    if certificate is None:
        return []
    steps = list(steps_of(plan, problem))
    seconds = {name: _step_seconds(plan, costs) for name, _, costs in steps}
    total = sum(weight * seconds[name] for name, weight, _ in steps)
    if not math.isclose(total, certificate.objective, rel_tol=TOLERANCE):
        faults.append(f"the seconds are {total}, the certificate claims {certificate.objective}")
    for name, value in seconds.items():
        claimed = certificate.in_sample.get(name)
        if claimed is None or not math.isclose(value, claimed, rel_tol=TOLERANCE):
            faults.append(f"a step of {name} takes {value} s, the certificate claims {claimed}")
    if certificate.bound is None:
        return faults
    if certificate.bound > certificate.objective * (1 + TOLERANCE):
        faults.append(f"the bound {certificate.bound} lies above the objective {certificate.objective}")
    if certificate.bound_name == "relaxation":
        faults += _bound_faults(plan, steps, certificate.bound, certificate.dual)
    return faults


def _is_traffic(chain: str) -> bool:
    return chain.startswith(("nvlink", "nic"))


def _step_seconds(plan: Plan, costs: DeviceCosts) -> float:
    total = 0.0
    for layer in range(plan.num_layers):
        load: dict[str, float] = defaultdict(float)
        for expert, homes in homes_of_layer(plan, layer).items():
            for chain, device, index, share in busy_devices(plan.cluster, homes[0]):
                load[chain] += share * float(costs.of(layer, device, index)[expert])
        for wanted in (False, True):
            total += max((value for chain, value in load.items() if _is_traffic(chain) == wanted), default=0.0)
    return total


def _bound_faults(
    plan: Plan, steps: list[tuple[str, float, DeviceCosts]], claimed: float, dual: dict[str, Any]
) -> list[str]:
    """The bound that the certificate's multipliers prove must not be below the claimed one."""
    try:
        prices = {str(name): float(price) for name, price in dual["bytes"].items()}
        chains = {str(name): np.array(rows, np.float64) for name, rows in dual["chains"].items()}
        wrong = [
            n for n, rows in chains.items() if rows.shape != (len(steps), plan.num_layers) or not (rows >= 0).all()
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return ["the certificate's multipliers cannot be read"]
    if wrong or not all(price >= 0 and math.isfinite(price) for price in prices.values()):
        return ["the certificate's multipliers must be tables of numbers that are not negative"]
    for wanted in (False, True):
        tables = [rows for chain, rows in chains.items() if _is_traffic(chain) == wanted]
        if tables and np.any(sum(tables) > np.array([[weight] for _, weight, _ in steps]) * (1 + TOLERANCE)):
            return ["the certificate's multipliers of a layer sum to more than the weight of its scenario"]
    found = _proved(plan, steps, prices, chains)
    if found < claimed * (1 - TOLERANCE):
        return [f"the multipliers prove a bound of {found}, the certificate claims {claimed}"]
    return []


def _proved(
    plan: Plan, steps: list[tuple[str, float, DeviceCosts]], prices: dict[str, float], chains: dict[str, Float]
) -> float:
    cluster, sizes = plan.cluster, expert_sizes(plan) or []
    whole = sizes[0] if len(set(sizes)) == 1 else None
    homes: list[Home] = [("gpu", g, False) for g in range(cluster.num_gpus) if cluster.memory_bytes_G[g] > 0]
    homes += [(place, m, s) for place in ("host", "ssd") for m in range(cluster.num_nodes) for s in (False, True)]
    homes = [h for h in homes if _room(cluster, h[0], h[1]) > 0 and _is_possible(cluster, h)]
    total = 0.0
    for layer, real in enumerate(plan.experts_L.tolist()):
        best_E = np.full(plan.num_experts, np.inf)
        for home in homes:
            cost_E = np.full(plan.num_experts, prices.get(_pool(home), 0.0) * sizes[layer])
            for chain, device, index, share in busy_devices(cluster, home):
                if chain in chains:
                    for w, (_, _, costs) in enumerate(steps):
                        cost_E = cost_E + chains[chain][w, layer] * share * costs.of(layer, device, index)
            best_E = np.minimum(best_E, cost_E)
        total += float(best_E[:real].sum())
    for place, index in dict.fromkeys((place, index) for place, index, _ in homes):
        room, price = _room(cluster, place, index), prices.get(_pool((place, index, False)), 0.0)
        if price:
            total -= price * (room if whole is None else math.floor(room / whole * (1 + 1e-12)) * whole)
    return total


def _pool(home: Home) -> str:
    return f"{ {'gpu': 'GPU', 'host': 'host memory of node', 'ssd': 'SSD of node'}[home[0]] } {home[1]}"
