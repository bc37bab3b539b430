"""What the commands print."""

from pathlib import Path

from rich.table import Table

from routing.ground.terminal import plain_console

from ..contract.plan import Plan
from ..scoring.check import doubled_copies
from ..scoring.score import Score


def print_certificate(plan: Plan, out: Path) -> None:
    """One table: objective, bound, gap and the metrics of a fresh plan."""
    certificate = plan.certificate
    assert certificate is not None
    table = Table("metric", "value")
    table.add_row(f"objective ({certificate.objective_name})", _number(certificate.objective))
    table.add_row(f"bound ({certificate.bound_name})", _number(certificate.bound))
    table.add_row("gap", _gap(certificate.gap))
    for name, value in certificate.in_sample.items():
        table.add_row(name, _number(value))
    for data, found in certificate.out_of_sample.items():
        for name, value in found.items():
            table.add_row(f"{name} ({data})", _number(value))
    if doubled := doubled_copies(plan):
        table.add_row("slots with a second copy on their GPU", str(doubled))
    table.add_row("seconds", f"{certificate.seconds:.2f}")
    console = plain_console()
    console.print(table)
    console.print(
        f"wrote {out}: {plan.num_layers} layers x {plan.num_slots} slots on {plan.cluster.num_gpus} GPUs "
        f"of {plan.cluster.num_nodes} node(s), by solver {plan.solver}",
        highlight=False,
    )


def print_score(found: Score) -> None:
    """One table: the metrics of each scenario, and the objective with its bound."""
    table = Table("data", "balancedness", "GPUs per token", "nodes per token", "hops")
    for name, values in found.scenarios.items():
        table.add_row(name, *(_number(values[key]) for key in ("balancedness", "gpu_fanout", "node_fanout", "hops")))
    console = plain_console()
    console.print(table)
    console.print(
        f"objective ({found.objective_name}) {_number(found.objective)}, bound ({found.bound_name}) "
        f"{_number(found.bound)}, gap {_gap(found.gap)}",
        highlight=False,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _gap(value: float | None) -> str:
    return "-" if value is None else f"{value:.3%}"
