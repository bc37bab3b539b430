"""Independent checker of plans with tiers: homes, bytes, seconds and the bound, derived again.

Shares no code with the model, its search and its programmes on purpose. Shapes: E experts.
"""

import math
from collections import Counter, defaultdict

import numpy as np
from numpy.typing import NDArray

from routing.ground.quantity import format_size

from ..contract.certificate import Certificate
from ..contract.plan import Plan
from ..contract.problem import Problem
from .costs import DeviceCosts, Home, busy_devices, computing_gpus, expert_sizes, steps_of
from .figures import Figure, compared, faults_of, kept_loads, not_derived
from .homes import homes_of_layer, is_possible, room
from .tier_bounds import bound_figures, is_traffic

Float = NDArray[np.float64]
_KINDS = {"gpu": "GPU", "peer": "peer GPU", "host": "host memory", "ssd": "SSD"}


def tier_faults(plan: Plan, made_from: Problem | None = None, *, searches: bool = True) -> list[str]:
    """Everything that is wrong with a plan that has homes below the GPUs; an empty list means that it may be written.

    Args:
        plan: read expert by expert.
        made_from: if given, what the certificate claims is derived again from it.
        searches: whether what an integer programme proved is searched again, which takes seconds.
    """
    return faults_of(tier_figures(plan, made_from, searches=searches))


def tier_figures(plan: Plan, made_from: Problem | None = None, *, searches: bool = True) -> list[Figure]:
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
            figures += _claims(plan, made_from, plan.certificate, searches)
    return figures


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
        if wrong := [e for e, places in homes.items() if not all(is_possible(plan.cluster, one) for one in places)]:
            faults.append(f"{where}: experts {wrong[:8]} are served in a way that the cluster does not have")
        if plan.tier_LE is not None and (other := _other_tiers(plan, layer, homes, real)):
            faults.append(f"{where}: the tier of experts {other[:8]} is not that of their homes")
    return faults


def _other_tiers(plan: Plan, layer: int, homes: dict[int, list[Home]], real: int) -> list[int]:
    assert plan.tier_LE is not None
    tiers = plan.tier_LE[layer].tolist()
    return [e for e in range(real) if e in homes and tiers[e] != ("gpu", "host", "ssd").index(homes[e][0][0])]


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
    computing = computing_gpus(plan.cluster)
    for kind in _KINDS if plan.cluster.tiers.peers else ("gpu", "host", "ssd"):
        memory = "gpu" if kind == "peer" else kind
        mine = {index: need for (place, index), need in sorted(used.items()) if place == memory}
        if memory == "gpu":
            mine = {index: need for index, need in mine.items() if (index in computing) == (kind == "gpu")}
        rooms = {index: room(plan, memory, index) for index in mine}
        faults = tuple(
            f"{kind} {index} needs {format_size(need)} for its experts and has {format_size(rooms[index])}"
            for index, need in mine.items()
            if need > rooms[index] * (1 + 1e-9)
        )
        shares = [need / rooms[index] if rooms[index] else math.inf for index, need in mine.items()]
        figures.append(Figure(name=f"fullest {_KINDS[kind]}", derived=max(shares, default=0.0), faults=faults))
    return figures


def _fit_faults(plan: Plan, problem: Problem) -> list[str]:
    if (plan.num_layers, plan.num_experts) == (problem.num_layers, problem.num_experts):
        mine, given = plan.cluster.to_json(), problem.cluster.to_json()
        differ = sorted(name for name in mine.keys() | given.keys() if mine.get(name) != given.get(name))
        return [f"the plan's cluster differs from the problem's in {', '.join(differ)}"] if differ else []
    return [
        f"the plan is for {plan.num_layers} layers x {plan.num_experts} experts, "
        f"the data has {problem.num_layers} x {problem.num_experts}"
    ]


def _claims(plan: Plan, problem: Problem, certificate: Certificate, searches: bool) -> list[Figure]:
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
    return [*figures, *bound_figures(plan, steps, certificate, searches=searches)]


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


def _step_seconds(plan: Plan, costs: DeviceCosts) -> float:
    total = 0.0
    for layer in range(plan.num_layers):
        load: dict[str, float] = defaultdict(float)
        for expert, homes in homes_of_layer(plan, layer).items():
            for chain, device, index, share in busy_devices(plan.cluster, homes[0]):
                load[chain] += share * float(costs.of(layer, device, index)[expert])
        for wanted in (False, True):
            total += max((value for chain, value in load.items() if is_traffic(chain) == wanted), default=0.0)
    return total
