"""What the commands print."""

from pathlib import Path

from rich.table import Table

from routing.ground.quantity import format_size
from routing.ground.terminal import plain_console

from ..checking.check import doubled_copies
from ..contract.plan import Plan
from ..pages.names import short_names
from ..scoring.score import METRICS, Score
from ..solving.request import SolveResult

UNITS = {"latency": " s per layer", "churn": " GB per layer"}
HEAD = ("balancedness", "GPUs per token", "nodes per token", "hops")


def print_result(result: SolveResult, out: Path) -> None:
    """The certificate, what moves, and what the solvers could not take into account."""
    print_certificate(result.plan, out)
    console = plain_console()
    if result.churn is not None:
        known = result.plan.cluster.model.bytes_per_expert is not None
        size = f", {format_size(result.churn.moved_bytes)}" if known else ""
        console.print(f"against the running plan: {result.churn.moved_copies} copies move{size}", highlight=False)
    for note in result.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def print_certificate(plan: Plan, out: Path) -> None:
    """One table: objective, bound, gap and the metrics of a fresh plan."""
    certificate = plan.certificate
    assert certificate is not None
    table = Table("metric", "value")
    unit = UNITS.get(certificate.objective_name, "")
    table.add_row(f"objective ({certificate.objective_name})", f"{_number(certificate.objective)}{unit}")
    table.add_row(f"bound ({certificate.bound_basis})", _number(certificate.bound))
    table.add_row("gap", _gap(certificate.gap))
    for name, value in certificate.in_sample.items():
        table.add_row(name, _number(value))
    labels = short_names(certificate.out_of_sample)
    for data, found in certificate.out_of_sample.items():
        for name, value in found.items():
            table.add_row(f"{name} ({labels[data]})", _number(value))
    if doubled := doubled_copies(plan):
        table.add_row("slots with a second copy on their GPU", str(doubled))
    table.add_row("seconds", f"{certificate.seconds:.2f}")
    console = plain_console()
    console.print(table)
    spare = plan.cluster.ep.spare_slots
    free = f" with {spare} free on each" if spare else ""
    console.print(
        f"wrote {out}: {plan.num_layers} layers x {plan.num_slots} slots on {plan.cluster.num_gpus} GPUs{free} "
        f"of {plan.cluster.num_nodes} node(s), by solver {plan.solver}",
        highlight=False,
    )


def print_score(found: Score) -> None:
    """One table: the metrics of each scenario, and the objective with its bound."""
    table = Table("data", *HEAD)
    labels = short_names(found.scenarios)
    for name, values in found.scenarios.items():
        table.add_row(labels[name], *(_number(values[key]) for key in METRICS))
    console, unit = plain_console(), UNITS.get(found.objective_name, "")
    console.print(table)
    console.print(
        f"objective ({found.objective_name}) {_number(found.objective)}{unit}, bound ({found.bound_name}) "
        f"{_number(found.bound)}, gap {_gap(found.gap)}",
        highlight=False,
    )


def print_scores(found: dict[str, Score]) -> None:
    """Several plans on the same data: one row for each plan and data."""
    table = Table("plan", "data", *HEAD)
    plans = short_names(found)
    for plan, one in found.items():
        labels = short_names(one.scenarios)
        for index, (name, values) in enumerate(one.scenarios.items()):
            table.add_row("" if index else plans[plan], labels[name], *(_number(values[key]) for key in METRICS))
        table.add_section()
    plain_console().print(table)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _gap(value: float | None) -> str:
    return "-" if value is None else f"{value:.3%}"
