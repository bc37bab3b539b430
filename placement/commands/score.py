"""`expertier place score` and `report`: judge a plan on data."""

from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_outputs

from .inputs import ordered_report, read_problem
from .options import JsonOption, LoadsOption, RowsOption, TraceOption


def score_command(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    trace: TraceOption = None,
    loads: LoadsOption = None,
    rows: RowsOption = None,
    objective: Annotated[str | None, typer.Option(help="Default: the plan's own.")] = None,
    json_file: JsonOption = None,
) -> None:
    """Score a plan on data, for instance on data that it was not made from.

    Example: `expertier place score plan.json --trace other.npz`
    """
    from routing.ground.files import write_json

    from ..contract.plan import Plan
    from ..scoring.score import score
    from .terminal import print_score

    expect_outputs(json_file, inputs=[plan_file, trace, *(loads or ())])
    plan = Plan.load(plan_file)
    problem = read_problem(trace, loads, rows, plan.cluster, plan.num_slots - plan.num_experts, plan)
    found = score(problem, plan, objective)
    print_score(found)
    if json_file:
        write_json(json_file, ordered_report(found.to_json()))


def report_command(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    out: Annotated[Path, typer.Option("--out", help="Where the page goes (HTML).")],
    trace: TraceOption = None,
    loads: LoadsOption = None,
    rows: RowsOption = None,
    pareto: Annotated[bool, typer.Option(help="Also solve for the front of balance against fan-out.")] = False,
) -> None:
    """Write one self-contained page: loads per rank, traffic before and after, gaps, expected gain.

    Example: `expertier place report plan.json --trace routing.npz --pareto --out report.html`
    """
    from routing.ground.terminal import plain_console

    from ..contract.plan import Plan
    from .report import write_report

    expect_outputs(out, inputs=[plan_file, trace, *(loads or ())])
    plan = Plan.load(plan_file)
    problem = read_problem(trace, loads, rows, plan.cluster, plan.num_slots - plan.num_experts, plan)
    write_report(problem, plan, out, with_pareto=pareto)
    plain_console().print(f"wrote {out}", highlight=False)
