"""`expertier place run`: carry plans out on processes; what needs torch is imported when it runs."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from routing.ground.expect import expect_outputs, expect_there

from ..train.distributed.launch import is_leader, is_worker, launch, started_processes
from .report import print_migration, print_plans, print_staying, print_woven

if TYPE_CHECKING:
    from placement import Plan
    from routing.traces import RoutingTrace

PlansArgument = Annotated[list[Path], typer.Argument(metavar="PLAN...", help="Plan files; several make a table.")]
AgainstOption = Annotated[
    list[str] | None, typer.Option("--against", help="Also a plan of this solver, such as contiguous; repeatable.")
]
ThenOption = Annotated[
    Path | None, typer.Option("--then", help="Afterwards go from the first plan to this one between forwards.")
]
DEFAULT_FORWARDS = 200
"""Forwards of a migration: enough that most of them see the map of a layer change."""


def place_run(
    plan_files: PlansArgument,
    trace: Annotated[Path, typer.Option("--trace", help="A routing trace (.npz), for instance of unseen rows.")],
    processes: Annotated[
        int | None, typer.Option(min=1, help="One per GPU of the plans; default: as many as they need.")
    ] = None,
    rows: Annotated[str | None, typer.Option("--rows", help="Only rows A:B of the trace.")] = None,
    against: AgainstOption = None,
    then: ThenOption = None,
    forwards: Annotated[int, typer.Option(min=1, help="Forwards during --then, at least.")] = DEFAULT_FORWARDS,
    width: Annotated[int, typer.Option(min=1, help="D, entries of a token.")] = 64,
    one_row_per_expert: Annotated[
        bool, typer.Option("--pairs", help="Send a row per expert instead of one per process.")
    ] = False,
    stay: Annotated[
        int | None,
        typer.Option(
            "--stay",
            metavar="WIDTH",
            min=0,
            help="Also let tokens stay where their experts are, where that pays beside keys and values of WIDTH "
            "entries per token and layer.",
        ),
    ] = None,
    woven: Annotated[
        bool, typer.Option("--woven", help="Also exchange parts of the tokens while another one is computed.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON.")] = None,
) -> None:
    """Carry out plans on processes of this machine: rows and bytes as counted beside what the plan predicts.

    Example: `expertier place run plan.json --trace unseen.npz --against contiguous --json run.json`
    """
    from placement import Plan

    expect_outputs(json_file, inputs=[*plan_files, trace, then])
    expect_there(trace)
    plans = {str(file): Plan.load(file) for file in plan_files}
    target = None if then is None else Plan.load(then)
    data = _rows(trace, rows)
    needed = _processes([*plans.values(), *([target] if target else [])], data)
    if processes is not None and processes != needed:
        raise ValueError(f"the plans are for {needed} GPUs; start one process for each, not {processes}")
    if not is_worker():
        raise typer.Exit(launch(sys.argv[1:], needed))
    if started_processes() != needed:
        raise ValueError(f"the plans are for {needed} GPUs, but torchrun started {started_processes()} processes")
    from .run import run_plans

    sent = "pair" if one_row_per_expert else "rank"
    found = run_plans(
        *(plans, data),
        against=against or (),
        width=width,
        rows=sent,
        then=target,
        forwards=forwards,
        context_width=stay,
        is_woven=woven,
    )
    if is_leader():
        _publish(found, json_file)


def _publish(found: dict[str, Any], json_file: Path | None) -> None:
    from routing.ground.files import write_json

    print_plans(found)
    print_staying(found)
    print_woven(found)
    if "migration" in found:
        print_migration(found["migration"])
    if json_file:
        write_json(json_file, found)


def _rows(file: Path, rows: str | None) -> "RoutingTrace":
    from routing.traces import RoutingTrace

    trace = RoutingTrace.load(file)
    if rows is not None:
        start, colon, stop = rows.partition(":")
        if not colon or not all(part == "" or part.isdecimal() for part in (start, stop)):
            raise ValueError(f"--rows must look like 0:20000; got {rows!r}")
        trace = trace.rows(int(start) if start else None, int(stop) if stop else None)
    if trace.num_tokens == 0:
        raise ValueError(f"no rows left of {file}; --rows is {rows}")
    return trace


def _processes(plans: "list[Plan]", trace: "RoutingTrace") -> int:
    """How many processes the plans need. Raises ValueError if one does not fit the trace or has lower tiers."""
    for plan in plans:
        if trace.num_layers != plan.num_layers or trace.num_experts > plan.num_experts:
            raise ValueError(
                f"the trace has {trace.num_layers} layers of {trace.num_experts} experts, "
                f"a plan {plan.num_layers} of {plan.num_experts}"
            )
        if trace.layer_ids is not None and trace.layer_ids != plan.layer_ids:
            raise ValueError(
                f"the trace was recorded at decoder layers {list(trace.layer_ids)}, "
                f"a plan is for {list(plan.layer_ids)}"
            )
        if plan.tier_LE is not None and (plan.tier_LE > 0).any():
            raise ValueError("a plan keeps experts in host memory or on disk; place run carries out GPU slots only")
    return max(plan.cluster.num_gpus for plan in plans)
