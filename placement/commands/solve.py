"""`expertier place solve`: place experts on a cluster, and say how good that is and could be."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from routing.ground.expect import expect_outputs

from .inputs import read_problem, read_validation
from .options import JsonOption, LoadsOption, RowsOption, TraceOption

if TYPE_CHECKING:
    from ..solving.request import SolveRequest

ClusterOption = Annotated[Path, typer.Option("--cluster", help="The cluster file (YAML).")]
OutOption = Annotated[Path, typer.Option("--out", help="Where the plan goes (JSON).")]
ObjectiveOption = Annotated[str, typer.Option(help="A name, a sum like fanout+2*balance, or balance<=1.1,fanout.")]
ReplicasOption = Annotated[int | None, typer.Option(help="Slots per layer beyond one per expert.")]
SpareOption = Annotated[
    int | None, typer.Option(min=0, help="Slots of each GPU and layer that stay free for later copies.")
]
SolverOption = Annotated[str, typer.Option(help="auto, search, lns, ilp, eplb, lpt, fill, contiguous, ...")]
TimeLimitOption = Annotated[float, typer.Option(help="Wall time in seconds, certificate included.")]
SeedOption = Annotated[int, typer.Option(help="Decides every random choice.")]
RobustnessOption = Annotated[str, typer.Option(help="How scenarios are joined: max, mean or cvar.")]
HoldoutOption = Annotated[float, typer.Option(help="Share of the trace's sequences to check with, not to plan on.")]
ValidateOption = Annotated[list[Path] | None, typer.Option(help="Data to check with (.npz trace, .json loads).")]
CurrentOption = Annotated[Path | None, typer.Option(help="The plan that runs now; GPUs are numbered to move least.")]
ChurnWeightOption = Annotated[
    float, typer.Option(help="With --current: objective units per GB that a layer moves; 0 only renumbers GPUs.")
]
BalanceFloorOption = Annotated[
    float | None, typer.Option(help="Choose the price of imbalance so that unseen data keeps this balancedness.")
]


def solve_command(
    cluster: ClusterOption,
    out: OutOption,
    trace: TraceOption = None,
    loads: LoadsOption = None,
    rows: RowsOption = None,
    objective: ObjectiveOption = "balance",
    replicas: ReplicasOption = None,
    spare_slots: SpareOption = None,
    solver: SolverOption = "auto",
    time_limit: TimeLimitOption = 30.0,
    seed: SeedOption = 0,
    robustness: RobustnessOption = "max",
    holdout: HoldoutOption = 0.0,
    validate: ValidateOption = None,
    current: CurrentOption = None,
    churn_weight: ChurnWeightOption = 0.0,
    balance_floor: BalanceFloorOption = None,
    json_file: JsonOption = None,
) -> None:
    """Place experts on a cluster, print how good that is and could be, write the plan.

    Example: `expertier place solve --trace t.npz --cluster c.yaml --objective fanout+balance --out plan.json`
    """
    from dataclasses import replace

    from ..contract.cluster import load_cluster
    from ..contract.plan import Plan
    from ..solving.request import SolveRequest
    from .one_machine import solve_in_tiers

    expect_outputs(out, json_file, inputs=[cluster, trace, *(loads or ()), *(validate or ()), current])
    machines = load_cluster(cluster)
    if spare_slots is not None:
        machines = replace(machines, ep=machines.ep.model_copy(update={"spare_slots": spare_slots}))
    problem = read_problem(
        trace, loads, rows, machines, replicas, spare_slots=machines.has_lower_tiers and not replicas
    )
    if not problem.fits_gpus:
        chosen = {
            "objective": objective,
            "current": current,
            "balance_floor": balance_floor,
            "holdout": holdout or None,
        }
        solve_in_tiers(problem, chosen, time_limit, seed, out, json_file)
        return
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
    _place(request, out, json_file)


def _place(request: "SolveRequest", out: Path, json_file: Path | None) -> None:
    from routing.ground.files import write_json

    from ..solving.request import run_request
    from .progress import solving
    from .terminal import print_result

    with solving() as progress:
        result = run_request(request, progress)
    result.plan.save(out)
    print_result(result, out)
    if json_file:
        write_json(json_file, result.to_json())
