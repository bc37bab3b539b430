"""Independent checker of plans with tiers: homes, bytes, seconds and the bound, derived again.

Shares no code with the model, its search and its programmes on purpose. Shapes: E experts.
"""

import math
from collections import Counter, defaultdict
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from routing.ground.quantity import format_size

from ..contract.certificate import Certificate
from ..contract.cluster import Cluster
from ..contract.plan import Plan
from ..contract.problem import Problem
from .costs import DeviceCosts, Home, busy_devices, expert_sizes, steps_of
from .figures import TOLERANCE, Figure, compared, faults_of, is_above, kept_loads, not_derived

Float = NDArray[np.float64]
_KINDS = {"gpu": "GPU", "host": "host memory", "ssd": "SSD"}


def tier_faults(plan: Plan, made_from: Problem | None = None) -> list[str]:
    """Everything that is wrong with a plan that has homes below the GPUs; an empty list means that it may be written.

    Args:
        plan: read expert by expert.
        made_from: if given, what the certificate claims is derived again from it.
    """
    return faults_of(tier_figures(plan, made_from))


def tier_figures(plan: Plan, made_from: Problem | None = None) -> list[Figure]:
    """Every figure of such a plan with what was derived for it; homes and bytes first, then the certificate."""
    figures = [Figure(name="a home for every expert", faults=tuple(_home_faults(plan)))]
    if not faults_of(figures):
        figures += _byte_figures(plan)
    if made_from is not None and not faults_of(figures):
        figures.append(Figure(name="layers, experts and machines", faults=tuple(_fit_faults(plan, made_from))))
    if plan.certificate is not None and not faults_of(figures):
        if made_from is None:
            figures.append(not_derived("seconds", plan.certificate.objective, "the planning data were not given"))
        else:
            figures += _claims(plan, made_from, plan.certificate)
    return figures


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
        if plan.tier_LE is not None and (other := _other_tiers(plan, layer, homes, real)):
            faults.append(f"{where}: the tier of experts {other[:8]} is not that of their homes")
    return faults


def _other_tiers(plan: Plan, layer: int, homes: dict[int, list[Home]], real: int) -> list[int]:
    assert plan.tier_LE is not None
    tiers = plan.tier_LE[layer].tolist()
    return [e for e in range(real) if e in homes and tiers[e] != ("gpu", "host", "ssd").index(homes[e][0][0])]


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


def _byte_figures(plan: Plan) -> list[Figure]:
    """For each kind of memory, how full the fullest one is."""
    sizes = expert_sizes(plan)
    if sizes is None or len(sizes) != plan.num_layers:
        wrong = f"metadata: expert_bytes must give {plan.num_layers} sizes"
        return [Figure(name="bytes of an expert", faults=(wrong,))]
    used: Counter[tuple[str, int]] = Counter()
    for layer, size in enumerate(sizes):
        for homes in homes_of_layer(plan, layer).values():
            for place, index, _ in homes:
                used[place, index] += size  # type: ignore[assignment]
    figures = []
    for kind in ("gpu", "host", "ssd"):
        mine = {index: need for (place, index), need in sorted(used.items()) if place == kind}
        rooms = {index: _room(plan, kind, index) for index in mine}
        faults = tuple(
            f"{kind} {index} needs {format_size(need)} for its experts and has {format_size(rooms[index])}"
            for index, need in mine.items()
            if need > rooms[index] * (1 + 1e-9)
        )
        shares = [need / rooms[index] if rooms[index] else math.inf for index, need in mine.items()]
        figures.append(Figure(name=f"fullest {_KINDS[kind]}", derived=max(shares, default=0.0), faults=faults))
    return figures


def _room(plan: Plan, place: str, index: int) -> float:
    """Bytes for experts; of a GPU without the slots that stay free in each layer."""
    cluster = plan.cluster
    rooms = {"gpu": cluster.memory_bytes_G, "host": cluster.dram_bytes_M, "ssd": cluster.ssd_bytes_M}
    spare = cluster.ep.spare_slots * sum(expert_sizes(plan) or []) if place == "gpu" else 0.0
    return max(float(rooms[place][index]) - spare, 0.0)


def _fit_faults(plan: Plan, problem: Problem) -> list[str]:
    if (plan.num_layers, plan.num_experts) == (problem.num_layers, problem.num_experts):
        mine, given = plan.cluster.to_json(), problem.cluster.to_json()
        differ = sorted(name for name in mine.keys() | given.keys() if mine.get(name) != given.get(name))
        return [f"the plan's cluster differs from the problem's in {', '.join(differ)}"] if differ else []
    return [
        f"the plan is for {plan.num_layers} layers x {plan.num_experts} experts, "
        f"the data has {problem.num_layers} x {problem.num_experts}"
    ]


def _claims(plan: Plan, problem: Problem, certificate: Certificate) -> list[Figure]:
    steps = list(steps_of(plan, problem))
    seconds = {name: _step_seconds(plan, costs) for name, _, costs in steps}
    total = sum(weight * seconds[name] for name, weight, _ in steps)
    figures = [kept_loads(plan, [_shares(scenario.load_LE) for scenario in problem.scenarios])]
    for name, value in seconds.items():
        figures.append(compared(f"a step of {name}", certificate.in_sample.get(name), value))
    if "seconds_per_step" in plan.metadata and plan.metadata["seconds_per_step"] != certificate.in_sample:
        wrong = "the seconds per step of the plan are not those of its certificate"
        figures.append(Figure(name="seconds per step of the plan", faults=(wrong,)))
    if "seconds_per_token" in plan.metadata:
        figures.append(compared("seconds per token", plan.metadata["seconds_per_token"], _token_seconds(plan, problem)))
    figures.append(compared("seconds", certificate.objective, total))
    return [*figures, _bound(plan, steps, certificate)]


def _shares(load_LE: Float) -> Float:
    return load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1e-300)


def _token_seconds(plan: Plan, problem: Problem) -> float:
    """Expected reads of one token on one machine, one after the other: what `place tiers --hardware` minimises."""
    c, total = plan.cluster, 0.0
    ways = [1 / rate for rate in (float(c.cpu_bytes_per_s_M[0]), float(c.pcie_bytes_per_s_M[0])) if rate > 0]
    use_LE = np.mean([_shares(scenario.load_LE) for scenario in problem.scenarios], axis=0) * problem.top_k
    for layer, size in enumerate(expert_sizes(plan) or []):
        for expert, homes in homes_of_layer(plan, layer).items():
            place = homes[0][0]
            below = min(ways) + (1 / float(c.ssd_bytes_per_s_M[0]) if place == "ssd" else 0.0)
            per_byte = 1 / float(c.hbm_bytes_per_s_G[0]) if place == "gpu" else below
            total += float(use_LE[layer, expert]) * size * per_byte
    return total


def _bound(plan: Plan, steps: list[tuple[str, float, DeviceCosts]], certificate: Certificate) -> Figure:
    claimed, seconds = certificate.bound, certificate.objective
    if claimed is None:
        return not_derived("bound", None, "there is none")
    if is_above(claimed, seconds):
        wrong = f"the bound {claimed} lies above the objective {seconds}"
        return Figure(name="bound", claimed=claimed, faults=(wrong,))
    faults = _multiplier_faults(plan, steps, certificate.dual)
    if faults:
        return Figure(name="bound", claimed=claimed, faults=faults)
    prices, chains = _multipliers(certificate.dual)
    figure = Figure(name="bound", claimed=claimed, derived=_proved(plan, steps, prices, chains))
    assert figure.derived is not None
    if not is_above(claimed, figure.derived):
        return figure
    if certificate.bound_name == "MIP dual":
        return replace(figure, open="an integer programme proved it; the multipliers alone prove less")
    return replace(
        figure, faults=(f"the multipliers prove a bound of {figure.derived}, the certificate claims {claimed}",)
    )


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


def _multipliers(dual: dict[str, Any]) -> tuple[dict[str, float], dict[str, Float]]:
    """Prices of a byte of each memory, and weights of each chain in each step and layer."""
    prices = {str(name): float(price) for name, price in dual["bytes"].items()}
    return prices, {str(name): np.array(rows, np.float64) for name, rows in dual["chains"].items()}


def _multiplier_faults(
    plan: Plan, steps: list[tuple[str, float, DeviceCosts]], dual: dict[str, Any]
) -> tuple[str, ...]:
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
        tables = [rows for chain, rows in chains.items() if _is_traffic(chain) == wanted]
        if tables and np.any(sum(tables) > np.array([[weight] for _, weight, _ in steps]) * (1 + TOLERANCE)):
            return ("the certificate's multipliers of a layer sum to more than the weight of its scenario",)
    return ()


def _proved(
    plan: Plan, steps: list[tuple[str, float, DeviceCosts]], prices: dict[str, float], chains: dict[str, Float]
) -> float:
    cluster, sizes = plan.cluster, expert_sizes(plan) or []
    whole = sizes[0] if len(set(sizes)) == 1 else None
    homes: list[Home] = [("gpu", g, False) for g in range(cluster.num_gpus) if cluster.memory_bytes_G[g] > 0]
    homes += [(place, m, s) for place in ("host", "ssd") for m in range(cluster.num_nodes) for s in (False, True)]
    homes = [h for h in homes if _room(plan, h[0], h[1]) > 0 and _is_possible(cluster, h)]
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
        room, price = _room(plan, place, index), prices.get(_pool((place, index, False)), 0.0)
        if price:
            total -= price * (room if whole is None else math.floor(room / whole * (1 + 1e-12)) * whole)
    return total


def _pool(home: Home) -> str:
    return f"{ {'gpu': 'GPU', 'host': 'host memory of node', 'ssd': 'SSD of node'}[home[0]] } {home[1]}"
