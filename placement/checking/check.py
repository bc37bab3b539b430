"""Independent checker: reads a plan slot by slot with plain loops and derives again what its file claims.

Shapes: L layers, E experts, P slots.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from routing.ground.quantity import format_size

from ..contract.certificate import Certificate
from ..contract.plan import Plan
from ..contract.problem import Problem
from .figures import (
    Figure,
    NotDerivedError,
    compared,
    faults_of,
    in_part,
    is_above,
    kept_loads,
    not_derived,
    worst_of,
)
from .layer_search import search_layers
from .metrics import METRICS
from .objective import bounds_again, layers_again
from .tiers import tier_figures

Float = NDArray[np.float64]
GAP_TOLERANCE = 1e-5  # bounds of layers come from linear programmes, whose tolerance is 1e-7 of each row


def check_plan(
    plan: Plan, data: Problem | None = None, *, made_from: Problem | None = None, derives_bounds: bool = True
) -> list[str]:
    """Everything that is wrong with a plan; an empty list means that it may be written.

    Args:
        plan: read slot by slot; its certificate's claims are checked if `made_from` is given.
        data: if given, the plan has to fit its shapes.
        made_from: if given, the plan has to fit it, and what the certificate claims is derived again from it.
        derives_bounds: whether that includes bounds, by other means than the solvers'; linear programmes of layers take
            seconds.

    Returns:
        One sentence per fault.
    """
    return faults_of(check_figures(plan, data, made_from=made_from, derives_bounds=derives_bounds))


def check_figures(
    plan: Plan,
    data: Problem | None = None,
    *,
    made_from: Problem | None = None,
    held: Mapping[str, Problem] | None = None,
    derives_bounds: bool = True,
) -> list[Figure]:
    """Every figure of a plan with what was derived for it; arguments as for `check_plan`.

    Args:
        held: further data by the name that the certificate gives them: its metrics on them are derived, too.

    Returns:
        Shape and memory first. Where these do not hold, nothing else is derived.
    """
    if plan.homes is not None:
        return tier_figures(plan, made_from, searches=derives_bounds)
    figures = [Figure(name="a copy of every expert", faults=tuple(_coverage_faults(plan)))]
    fits = data or made_from
    if fits is not None and not faults_of(figures):
        figures.append(Figure(name="layers, experts and memory", faults=tuple(_fit_faults(plan, fits))))
    if plan.certificate is not None and plan.tier_LE is None and not faults_of(figures):
        figures += _claims(plan, plan.certificate, made_from, derives_bounds)
        figures += _held_out(plan, plan.certificate, held or {})
    return figures


def require_valid(plan: Plan, made_from: Problem) -> None:
    """Raise RuntimeError with the first faults, if there are any: a solver that makes such a plan is wrong.

    What takes long is not derived again here, because a solver has a time limit: bounds, and shares by source GPU.
    """
    known = made_from if plan.dispatch == "uniform" else None
    if faults := check_plan(plan, made_from, made_from=known, derives_bounds=False):
        raise RuntimeError(f"the plan failed its check: {'; '.join(faults[:4])}")


def doubled_copies(plan: Plan) -> int:
    """Slots that hold a second copy of an expert on the same GPU: wasted memory, refused by some engines."""
    per_gpu, wasted = plan.slots_per_gpu, 0
    for row in plan.physical_to_logical_LP.tolist():
        for start in range(0, len(row), per_gpu):
            slots = row[start : start + per_gpu]
            wasted += len(slots) - len(set(slots))
    return wasted


def _coverage_faults(plan: Plan) -> list[str]:
    faults = []
    for index, row in enumerate(plan.physical_to_logical_LP.tolist()):
        seen = set(row)
        if plan.tier_LE is not None:
            seen |= {expert for expert, tier in enumerate(plan.tier_LE[index].tolist()) if tier > 0}
        real = plan.num_experts if plan.experts_per_layer is None else plan.experts_per_layer[index]
        if missing := [expert for expert in range(real) if expert not in seen]:
            faults.append(f"layer {plan.layer_ids[index]}: experts {missing[:8]} have no copy")
        if outside := [expert for expert in row if not 0 <= expert < real]:
            faults.append(f"layer {plan.layer_ids[index]}: slots name experts {outside[:8]} of {real}")
    return faults


def _fit_faults(plan: Plan, problem: Problem) -> list[str]:
    faults = []
    if (plan.num_layers, plan.num_experts) != (problem.num_layers, problem.num_experts):
        faults.append(
            f"the plan is for {plan.num_layers} layers x {plan.num_experts} experts, "
            f"the data has {problem.num_layers} x {problem.num_experts}"
        )
    size = plan.cluster.model.bytes_per_expert
    if size is not None and plan.tier_LE is None:
        needed = (plan.slots_per_gpu + plan.cluster.ep.spare_slots) * plan.num_layers * size
        for gpu, memory in enumerate(plan.cluster.memory_bytes_G.tolist()):
            if needed > memory * (1 + 1e-12):
                faults.append(f"GPU {gpu} needs {format_size(needed)} for its experts and has {format_size(memory)}")
                break
    return faults


def _claims(plan: Plan, certificate: Certificate, problem: Problem | None, derives_bounds: bool) -> list[Figure]:
    """What the certificate says of the planning data."""
    if problem is None:
        return [
            not_derived(name, value, "the planning data were not given")
            for name, value in (*certificate.in_sample.items(), ("objective", certificate.objective))
        ] + [_bound_below(certificate)]
    figures = [kept_loads(plan, [scenario.load_LE for scenario in problem.scenarios])]
    figures += [
        _metric(name, certificate.in_sample.get(name), plan, problem)
        for name in METRICS
        if problem.has_tokens or name == "balancedness"
    ]
    name = f"objective {certificate.objective_name}"
    try:
        value_L = layers_again(plan, problem, certificate.objective_name, certificate.robustness)
    except NotDerivedError as why:
        return [*figures, not_derived(name, certificate.objective, str(why)), _bound_below(certificate)]
    figures.append(compared(name, certificate.objective, float(value_L.mean())))
    if plan.objective_name != certificate.objective_name:
        wrong = f"the plan was made for {plan.objective_name}, the certificate is of {certificate.objective_name}"
        figures.append(Figure(name="objective's name", faults=(wrong,)))
    if certificate.bound is not None:
        figures += _bounds(plan, problem, certificate, value_L, derives_bounds)
    return figures


def _metric(name: str, claimed: float | None, plan: Plan, problem: Problem, label: str = "") -> Figure:
    try:
        value = worst_of(name, (METRICS[name](plan, scenario) for scenario in problem.scenarios))
    except NotDerivedError as why:
        return not_derived(name + label, claimed, str(why))
    return compared(name + label, claimed, value)


def _held_out(plan: Plan, certificate: Certificate, held: Mapping[str, Problem]) -> list[Figure]:
    """The metrics on other data; of those that were not given, one line each."""
    figures = []
    for data, claims in certificate.out_of_sample.items():
        if data not in held:
            figures.append(not_derived(f"metrics on {data}", None, "these data were not given"))
            continue
        asked = METRICS if held[data].has_tokens else ("balancedness",)
        figures += [_metric(name, claims.get(name), plan, held[data], f" on {data}") for name in asked]
    return figures


def _bound_below(certificate: Certificate) -> Figure:
    """All that can be said of a bound without deriving it: it must not lie above the objective."""
    bound, objective = certificate.bound, certificate.objective
    if bound is not None and is_above(bound, objective):
        return Figure(name="bound", claimed=bound, faults=(f"the bound {bound} lies above the objective {objective}",))
    return not_derived("bound", bound, "there is none" if bound is None else "only that it is below the objective")


def _bounds(
    plan: Plan, problem: Problem, certificate: Certificate, value_L: Float, derives_bounds: bool
) -> list[Figure]:
    """The bound against what the data prove and a search adds, and the gaps of the layers against both."""
    below = _bound_below(certificate)
    if below.faults or not derives_bounds:
        return [below]
    gaps = _gaps(certificate, value_L)
    try:
        proved_L = bounds_again(plan, problem, certificate.objective_name, certificate.robustness)
    except NotDerivedError as why:
        return [not_derived("bound", certificate.bound, str(why)), *gaps]
    figures = []
    if certificate.data_bound is not None:
        by_data = min(float(proved_L.mean()), certificate.objective)
        figures.append(compared("bound by the data alone", certificate.data_bound, by_data, tolerance=GAP_TOLERANCE))
    claimed_L = None if not gaps or faults_of(gaps) else value_L * (1 - np.array(certificate.gap_L))
    return [*figures, _bound(plan, problem, certificate, proved_L, claimed_L), *gaps]


def _bound(plan: Plan, problem: Problem, certificate: Certificate, proved_L: Float, claimed_L: Float | None) -> Figure:
    claimed, proved = certificate.bound, float(proved_L.mean())
    assert claimed is not None
    if not is_above(claimed, proved):
        return Figure(name="bound", claimed=claimed, derived=proved)
    if "MIP dual" not in certificate.bound_name:
        wrong = f"the bound is {proved}, the certificate claims {claimed}"
        return Figure(name="bound", claimed=claimed, derived=proved, faults=(wrong,))
    if claimed_L is not None and (certificate.robustness == "max" or len(problem.scenarios) == 1):
        found = search_layers(plan, problem, certificate.objective_name, claimed_L, proved_L)
        if found.fault:
            return Figure(name="bound", claimed=claimed, faults=(found.fault,))
        proved = float(found.proved_L.mean())
    return in_part("bound", claimed, proved, "the data and a search")


def _gaps(certificate: Certificate, value_L: Float) -> list[Figure]:
    """The gaps of the layers lie in 0..1 and leave the bound."""
    gaps = certificate.gap_L
    if not gaps:
        return []
    if len(gaps) != len(value_L) or not all(0 <= gap <= 1 for gap in gaps):
        wrong = f"the gaps of {len(value_L)} layers must lie in 0..1; the certificate has {gaps[:4]}"
        return [Figure(name="gaps of the layers", faults=(wrong,))]
    left = float(np.mean([value * (1 - gap) for value, gap in zip(value_L.tolist(), gaps, strict=True)]))
    found = compared("bound by the gaps of the layers", certificate.bound, left, tolerance=GAP_TOLERANCE)
    wrong = f"the gaps of the layers leave a bound of {left}, the certificate claims {certificate.bound}"
    return [replace(found, faults=(wrong,)) if found.faults else found]
