"""`expertier place score` and `report`: judge plans on data."""

from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_outputs

from .inputs import judging_problem
from .options import JsonOption, LoadsOption, RowsOption, TraceOption


def score_command(
    plan_files: Annotated[list[Path], typer.Argument(metavar="PLAN...", help="Plan files; several make a table.")],
    trace: TraceOption = None,
    loads: LoadsOption = None,
    rows: RowsOption = None,
    objective: Annotated[str | None, typer.Option(help="Default: each plan's own.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Also judge batches of so many tokens, by every way to choose copies.")
    ] = None,
    shared_experts: Annotated[
        int, typer.Option(min=0, help="With --batch-tokens: rows of each token that fill up.")
    ] = 0,
    json_file: JsonOption = None,
) -> None:
    """Score plans on data, for instance on data that they were not made from.

    Example: expertier place score ours.json theirs.json --loads monday.json --loads sunday.json
    """
    from routing.ground.files import write_json

    from ..contract.plan import Plan
    from ..objectives import find_objective
    from ..scoring.score import ordered_report, score
    from .batch_report import judge_batches, print_batches
    from .terminal import print_score, print_scores
    from .tier_report import score_plans_with_tiers

    expect_outputs(json_file, inputs=[*plan_files, trace, *(loads or ())])
    chosen = None if objective is None else find_objective(objective)
    plans = {file: Plan.load(file) for file in plan_files}
    if any(plan.homes is not None for plan in plans.values()):
        score_plans_with_tiers(plans, trace, loads, rows, objective, json_file)
        return
    found = {}
    for file, plan in plans.items():
        found[str(file)] = score(judging_problem(plan, trace, loads, rows), plan, chosen)
    reports = {name: ordered_report(one.to_json()) for name, one in found.items()}
    if batch_tokens is not None:
        for file, plan in plans.items():
            batches = judge_batches(plan, judging_problem(plan, trace, loads, rows), batch_tokens, shared_experts)
            print_batches(str(file), batches)
            reports[str(file)]["batches"] = batches
    if len(found) == 1:
        print_score(next(iter(found.values())))
    else:
        print_scores(found)
    if json_file:
        write_json(json_file, next(iter(reports.values())) if len(reports) == 1 else {"plans": reports})


def report_command(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    out: Annotated[Path, typer.Option("--out", help="Where the page goes (HTML).")],
    trace: TraceOption = None,
    loads: LoadsOption = None,
    rows: RowsOption = None,
    against: Annotated[
        Path | None, typer.Option(metavar="PLAN", help="Another plan, judged on the same data beside this one.")
    ] = None,
    pareto: Annotated[bool, typer.Option(help="Also solve for the front of balance against fan-out.")] = False,
) -> None:
    """Write one self-contained page: loads per rank, batches over time, traffic, gaps, expected gain.

    A plan with tiers gets a page of its own: what is where, what binds, what more hardware would bring.

    Example: `expertier place report plan.json --trace routing.npz --pareto --out report.html`
    """
    from routing.ground.terminal import plain_console

    from ..contract.plan import Plan
    from ..pages.page import write_report
    from ..pages.tier_page import write_tier_page
    from .inputs import read_problem

    expect_outputs(out, inputs=[plan_file, against, trace, *(loads or ())])
    plan, other = Plan.load(plan_file), None if against is None else Plan.load(against)
    if plan.homes is not None:
        write_tier_page(read_problem(trace, loads, rows, plan.cluster, None, spare_slots=True), plan, out, other)
    elif other is not None and other.homes is not None:
        raise ValueError(f"{against} has tiers and {plan_file} has none; they are not judged alike")
    else:
        write_report(judging_problem(plan, trace, loads, rows), plan, out, with_pareto=pareto, other=other)
    plain_console().print(f"wrote {out}", highlight=False)
