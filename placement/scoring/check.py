"""Independent checker: reads a plan slot by slot with plain loops and recomputes what is claimed about it.

Shares no code with solvers and objectives on purpose.
"""

import numpy as np

from routing.ground.quantity import format_size

from ..contract.certificate import Certificate
from ..contract.plan import Plan
from ..contract.problem import Problem
from .check_metrics import bounds_again, layers_again, metrics_again, objective_again
from .check_tiers import tier_faults

TOLERANCE = 1e-6  # sums of float64 in another order differ by less
GAP_TOLERANCE = 1e-5  # bounds of layers come from linear programmes, whose tolerance is 1e-7 of each row


def check_plan(
    plan: Plan, data: Problem | None = None, *, made_from: Problem | None = None, derives_bounds: bool = True
) -> list[str]:
    """Everything that is wrong with a plan; an empty list means that it may be written.

    Args:
        plan: read slot by slot; its certificate's claims are checked if `made_from` is given.
        data: if given, the plan has to fit its shapes.
        made_from: if given, the plan has to fit it, and what the certificate claims is recomputed on it.
        derives_bounds: whether that includes bounds, by other means than the solvers'; linear programmes of layers take
            seconds.

    Returns:
        One sentence per fault.
    """
    if plan.homes is not None:
        return tier_faults(plan, made_from)
    faults = _coverage_faults(plan)
    fits = data or made_from
    if fits is not None and not faults:
        faults += _fit_faults(plan, fits)
    if made_from is not None and not faults:
        faults += _claim_faults(plan, made_from, derives_bounds)
    return faults


def require_valid(plan: Plan, made_from: Problem) -> None:
    """Raise RuntimeError with the first faults, if there are any: a solver that makes such a plan is wrong.

    Bounds are not derived again here, because a solver has a time limit.
    """
    if faults := check_plan(plan, made_from=made_from, derives_bounds=False):
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
        needed = plan.slots_per_gpu * plan.num_layers * size
        for gpu, memory in enumerate(plan.cluster.memory_bytes_G.tolist()):
            if needed > memory * (1 + 1e-12):
                faults.append(f"GPU {gpu} needs {format_size(needed)} for its experts and has {format_size(memory)}")
                break
    return faults


def _claim_faults(plan: Plan, problem: Problem, derives_bounds: bool) -> list[str]:
    certificate = plan.certificate
    if certificate is None:
        return []
    faults = []
    if certificate.bound is not None and certificate.bound > certificate.objective * (1 + TOLERANCE) + TOLERANCE:
        faults.append(f"the bound {certificate.bound} lies above the objective {certificate.objective}")
    if plan.dispatch == "uniform" and plan.tier_LE is None:
        faults += _metric_faults(plan, problem, certificate)
        faults += _bound_faults(plan, problem, certificate) if derives_bounds else []
    return faults


def _metric_faults(plan: Plan, problem: Problem, certificate: Certificate) -> list[str]:
    """Metrics and objective of a certificate against what the slots and the data say."""
    faults = []
    found = [metrics_again(plan, scenario) for scenario in problem.scenarios]
    for name in found[0]:
        value = (min if name == "balancedness" else max)(one.get(name, np.nan) for one in found)
        claimed = certificate.in_sample.get(name)
        if np.isfinite(value) and (claimed is None or abs(value - claimed) > TOLERANCE * max(1.0, abs(value))):
            faults.append(f"{name} is {value}, the certificate claims {claimed}")
    own = objective_again(plan, problem)
    if own is not None and abs(own - certificate.objective) > TOLERANCE * max(1.0, abs(own)):
        faults.append(f"the objective {plan.objective_name} is {own}, the certificate claims {certificate.objective}")
    return faults


def _bound_faults(plan: Plan, problem: Problem, certificate: Certificate) -> list[str]:
    """The bound against what the data prove, and the gaps of the layers against both; not what a programme proved."""
    faults: list[str] = []
    layers = layers_again(plan, problem)
    if layers is None or certificate.bound is None:
        return faults
    if certificate.gap_L:
        if len(certificate.gap_L) != len(layers) or not all(0 <= gap <= 1 for gap in certificate.gap_L):
            return [f"the gaps of {len(layers)} layers must lie in 0..1; the certificate has {certificate.gap_L[:4]}"]
        left = float(np.mean([value * (1 - gap) for value, gap in zip(layers, certificate.gap_L, strict=True)]))
        if abs(left - certificate.bound) > GAP_TOLERANCE * max(1.0, abs(left)):
            faults.append(f"the gaps of the layers leave a bound of {left}, the certificate claims {certificate.bound}")
    if "MIP dual" not in certificate.bound_name and (proved := bounds_again(plan, problem)) is not None:
        least = float(np.mean(proved))
        if certificate.bound > least * (1 + TOLERANCE):
            faults.append(f"the bound is {least}, the certificate claims {certificate.bound}")
    return faults
