"""`expertier place solve`: place experts on a cluster, and say how good that is and could be."""

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from .inputs import ordered_report, read_problem, read_validation, require_folder, split_by_sequence
from .options import JsonOption, LoadsOption, RowsOption, TraceOption


def solve_command(
    cluster: Annotated[Path, typer.Option("--cluster", help="The cluster file (YAML).")],
    out: Annotated[Path, typer.Option("--out", help="Where the plan goes (JSON).")],
    trace: TraceOption = None,
    loads: LoadsOption = None,
    rows: RowsOption = None,
    objective: Annotated[
        str, typer.Option(help="A name, a sum like fanout+2*balance, or balance<=1.1,fanout.")
    ] = "balance",
    replicas: Annotated[int | None, typer.Option(help="Extra slots per layer.")] = None,
    solver: Annotated[str, typer.Option(help="auto, search, lns, ilp, eplb, lpt, contiguous, ...")] = "auto",
    time_limit: Annotated[float, typer.Option(help="Seconds for the solver.")] = 30.0,
    seed: Annotated[int, typer.Option(help="For every random choice.")] = 0,
    robustness: Annotated[str, typer.Option(help="How scenarios are joined: max, mean or cvar.")] = "max",
    holdout: Annotated[float, typer.Option(help="Share of the trace's sequences to check with, not to plan on.")] = 0.0,
    validate: Annotated[list[Path] | None, typer.Option(help="Data to check with (.npz trace, .json loads).")] = None,
    current: Annotated[
        Path | None, typer.Option(help="The plan that runs now; GPUs are numbered to move least.")
    ] = None,
    churn_weight: Annotated[
        float, typer.Option(help="With --current: objective units per GB that a layer moves; 0 only renumbers GPUs.")
    ] = 0.0,
    balance_floor: Annotated[
        float | None, typer.Option(help="Choose the price of imbalance so that unseen data keeps this balancedness.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Place experts on a cluster, print how good that is and could be, write the plan.

    Example: `expertier place solve --trace t.npz --cluster c.yaml --objective fanout+balance --out plan.json`
    """
    from dataclasses import replace

    from routing.ground.files import write_json

    from ..contract.cluster import load_cluster
    from ..contract.plan import Plan
    from ..objectives import Robustness, find_objective, with_churn
    from ..objectives.churn import churn
    from ..solving.certify import validate_plan
    from ..solving.elastic import match_gpus
    from ..solving.solve import solve
    from .progress import solving
    from .terminal import print_certificate

    require_folder(out, json_file)
    if robustness not in get_args(Robustness):
        raise ValueError(f"--robustness must be one of {', '.join(get_args(Robustness))}; got {robustness!r}")
    problem = read_problem(trace, loads, rows, load_cluster(cluster), replicas)
    held = read_validation(validate or [], problem)
    if holdout:
        problem, held["held-out sequences"] = split_by_sequence(problem, holdout, seed)
    running = None if current is None else Plan.load(current)
    if churn_weight and running is None:
        raise ValueError("--churn-weight needs --current PLAN, the plan that runs now")
    problem = replace(problem, current=running)
    with solving() as progress:
        plan = solve(
            problem,
            objective=with_churn(find_objective(objective), churn_weight) if churn_weight else objective,
            solver=solver,
            time_limit_s=time_limit,
            balance_floor=balance_floor,
            seed=seed,
            robustness=cast(Robustness, robustness),
            progress=progress,
        )
    plan = validate_plan(plan, held)
    moved = None
    if running is not None:
        plan = plan if churn_weight else match_gpus(running, plan)
        moved = vars(churn(running, plan, plan.cluster.model.expert_bytes or 1.0))
    plan.save(out)
    assert plan.certificate is not None
    print_certificate(plan, out)
    if moved:
        typer.echo(f"against {current}: {moved['moved_copies']} copies move")
    if json_file:
        write_json(
            json_file, ordered_report(plan.certificate.to_json() | plan.certificate.in_sample | {"churn": moved})
        )
