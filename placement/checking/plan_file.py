"""What a plan file says twice: numbers that its reader computes by itself must stand there as they are."""

from typing import Any

from ..contract.plan import Plan
from .figures import Figure, compared


def file_figures(value: dict[str, Any], plan: Plan) -> list[Figure]:
    """The redundant numbers of a file, each against the plan that was read from it.

    Args:
        value: the file's JSON object.
        plan: what `Plan.from_json` made of it.
    """
    said: dict[str, tuple[Any, Any]] = {
        name: (value[name], getattr(plan.cluster if name == "num_gpus" else plan, name))
        for name in ("num_gpus", "slots_per_gpu")
        if name in value
    }
    certificate = value.get("certificate") or {}
    if plan.certificate is not None:
        found = plan.certificate.to_json()
        said |= {name: (certificate[name], found[name]) for name in ("gap", "proven_optimal") if name in certificate}
    return [_same(name, *pair) for name, pair in said.items()]


def _same(name: str, claimed: Any, found: Any) -> Figure:
    """Numbers agree but for rounding; null agrees with null."""
    if claimed is None or found is None:
        wrong = () if claimed is found else (f"{name} is {found}, the file says {claimed}",)
        return Figure(name=f"{name} of the file", faults=wrong)
    return compared(f"{name} of the file", claimed, float(found))
