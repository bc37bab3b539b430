"""`expertier place solve`: place experts on a cluster, and say how good that is and could be."""

from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_outputs

from .inputs import read_problem, read_validation
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
    replicas: Annotated[int | None, typer.Option(help="Slots per layer beyond one per expert.")] = None,
    solver: Annotated[str, typer.Option(help="auto, search, lns, ilp, eplb, lpt, contiguous, ...")] = "auto",
    time_limit: Annotated[float, typer.Option(help="Wall time in seconds, certificate included.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Decides every random choice.")] = 0,
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
    from ..solving.request import SolveRequest, run_request
    from .progress import solving
    from .terminal import print_result

    inputs = [cluster, trace, *(loads or ()), *(validate or ()), current]
    expect_outputs(out, json_file, inputs=inputs)
    problem = read_problem(trace, loads, rows, load_cluster(cluster), replicas)
    request = SolveRequest(
        problem=replace(problem, current=None if current is None else Plan.load(current)),
        objective=objective,
        solver=solver,
        time_limit_s=time_limit,
        seed=seed,
        robustness=robustness,
        balance_floor=balance_floor,
        holdout=holdout,
        held=read_validation(validate or [], problem),
        churn_weight=churn_weight,
    )
    with solving() as progress:
        result = run_request(request, progress)
    result.plan.save(out)
    print_result(result, out)
    if json_file:
        write_json(json_file, result.to_json())
