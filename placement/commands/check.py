"""`expertier place check`: every figure of a plan file derived again, by code that no solver uses."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from routing.ground.expect import expect_outputs

from .options import JsonOption, LoadsOption, RowsOption, TraceOption

if TYPE_CHECKING:
    from ..checking.figures import Figure
    from ..contract.plan import Plan
    from ..contract.problem import Problem

MANY = 4  # names in one message


def check_command(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    trace: TraceOption = None,
    loads: LoadsOption = None,
    rows: RowsOption = None,
    validate: Annotated[
        list[Path] | None, typer.Option(help="Data that the plan was checked with, as `solve --validate` had them.")
    ] = None,
    current: Annotated[
        Path | None, typer.Option(help="The plan that ran before, as `solve --current` had it; for churn.")
    ] = None,
    cluster: Annotated[Path | None, typer.Option(help="The cluster file whose machines the plan must be for.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Derive every figure of a plan again from the data that it was made from, by code that no solver uses.

    Exit code 1 says that a figure does not hold. Without data, only what the file settles itself is checked.

    Example: `expertier place check plan.json --trace routing.npz`
    """
    import json
    from dataclasses import replace

    from routing.ground.files import write_json

    from ..checking.check import check_figures
    from ..checking.figures import faults_of
    from ..checking.plan_file import file_figures
    from ..contract.plan import Plan

    expect_outputs(json_file, inputs=[plan_file, trace, *(loads or ()), *(validate or ()), current, cluster])
    plan = Plan.load(plan_file)
    problem, held = _planning_data(plan, trace, loads, rows)
    if problem is not None and current is not None:
        problem = replace(problem, current=Plan.load(current))
    held |= _validation(plan, validate or [])
    figures = file_figures(json.loads(plan_file.read_text(encoding="utf-8")), plan)
    figures += _machines(plan, cluster) if cluster is not None else []
    figures += check_figures(plan, made_from=problem, held=held)
    _print(figures)
    if json_file:
        write_json(json_file, {"holds": not faults_of(figures), "figures": [figure.to_json() for figure in figures]})
    if faults_of(figures):
        raise typer.Exit(1)


def _planning_data(
    plan: "Plan", trace: Path | None, loads: list[Path] | None, rows: str | None
) -> tuple["Problem | None", dict[str, "Problem"]]:
    """The problem that the plan was made for, and what `--holdout` kept back of it."""
    from ..solving.request import HELD_OUT, split_by_sequence
    from .inputs import EVEN, even_loads, judging_problem, read_problem

    if trace is None and not loads:
        return (even_loads(plan) if plan.metadata.get("planned_on") == [EVEN] else None), {}
    if plan.homes is not None:
        return read_problem(trace, loads, rows, plan.cluster, None, spare_slots=True), {}
    problem = judging_problem(plan, trace, loads, rows)
    if (problem.num_layers, problem.num_experts) != (plan.num_layers, plan.num_experts):
        raise ValueError(
            f"the plan is for {plan.num_layers} layers x {plan.num_experts} experts, "
            f"the data has {problem.num_layers} x {problem.num_experts}"
        )
    if (holdout := plan.metadata.get("holdout")) is None:
        return problem, {}
    if not isinstance(holdout, dict) or not all(isinstance(holdout.get(key), int | float) for key in ("share", "seed")):
        raise ValueError(f"the plan's metadata must give share and seed of its holdout; got {holdout}")
    kept, aside = split_by_sequence(problem, float(holdout["share"]), int(holdout["seed"]))
    return kept, {HELD_OUT: aside}


def _validation(plan: "Plan", files: list[Path]) -> dict[str, "Problem"]:
    """Held-out data under the names that the certificate gives them: the paths of then, or the same files' names."""
    from .inputs import judging_problem

    names = [] if plan.certificate is None else list(plan.certificate.out_of_sample)
    found = {}
    for file in files:
        alike = [name for name in names if name == str(file)] or [n for n in names if Path(n).name == file.name]
        if len(alike) != 1:
            known = ", ".join(names[:MANY]) or "none"
            raise ValueError(f"--validate {file}: the certificate has metrics on {known}; name one of these files")
        is_trace = file.suffix == ".npz"
        found[alike[0]] = judging_problem(plan, file if is_trace else None, None if is_trace else [file], None)
    return found


def _machines(plan: "Plan", file: Path) -> list["Figure"]:
    """Whether the plan is for the machines of a cluster file; its sections `model`, `ep` and `tiers` may differ."""
    from ..checking.figures import Figure
    from ..contract.cluster import load_cluster

    mine, given = (_hardware(cluster.to_json()) for cluster in (plan.cluster, load_cluster(file)))
    differ = sorted(name for name in mine.keys() | given.keys() if mine.get(name) != given.get(name))
    wrong = (f"the plan's machines differ from those of {file} in {', '.join(differ[:MANY])}",) if differ else ()
    return [Figure(name="machines of the cluster file", faults=wrong)]


def _hardware(value: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in value.items() if name not in ("model", "ep", "tiers")}


def _print(figures: list["Figure"]) -> None:
    """One line per figure, then what is wrong or open, then the sum."""
    from collections import Counter

    from rich.table import Table

    from routing.ground.terminal import plain_console

    from ..checking.figures import FAILS, HOLDS, OPEN, PARTLY

    console = plain_console(soft_wrap=True)
    table = Table("figure", "claimed", "derived", "verdict")
    for one in figures:
        table.add_row(one.name, _number(one.claimed), _number(one.derived), one.verdict)
    console.print(table)
    for one in figures:
        for fault in one.faults:
            console.print(f"does not hold: {fault}", highlight=False, markup=False)
        if one.open and not one.faults:
            console.print(f"{one.verdict}: {one.name}: {one.open}", highlight=False, markup=False)
    count = Counter(one.verdict for one in figures)
    console.print(
        f"{len(figures)} figures: {count[HOLDS]} hold, {count[FAILS]} do not, {count[PARTLY]} hold in part, "
        f"{count[OPEN]} not derived"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.9g}"
