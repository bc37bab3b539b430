"""`expertier place`: solve, score and export expert placements."""

from pathlib import Path
from typing import Annotated, Any, cast, get_args

import typer

from .command_data import read_problem, read_validation, require_folder, split_by_sequence

app = typer.Typer(help="Solve where experts should live on a cluster.", no_args_is_help=True)

TraceOption = Annotated[Path | None, typer.Option("--trace", help="A routing trace (.npz).")]
LoadsOption = Annotated[
    list[Path] | None,
    typer.Option("--loads", help='JSON with "logical_count"; repeat it for scenarios.'),
]
RowsOption = Annotated[str | None, typer.Option("--rows", help="Only rows A:B of the trace.")]
JsonOption = Annotated[Path | None, typer.Option("--json", help="Also write the result as JSON.")]


@app.command("solve")
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

    from .cluster import load_cluster
    from .elastic import match_gpus
    from .objectives import Robustness, find_objective, with_churn
    from .objectives.churn import churn
    from .plan import Plan
    from .progress import solving
    from .solvers import solve, validate_plan
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
        write_json(json_file, _report(plan.certificate.to_json() | plan.certificate.in_sample | {"churn": moved}))


@app.command("score")
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

    from .plan import Plan
    from .scoring import score
    from .terminal import print_score

    require_folder(json_file)
    plan = Plan.load(plan_file)
    problem = read_problem(trace, loads, rows, plan.cluster, plan.num_slots - plan.num_experts, plan)
    found = score(problem, plan, objective)
    print_score(found)
    if json_file:
        write_json(json_file, _report(found.to_json()))


@app.command("cluster")
def cluster_command(
    file: Annotated[Path, typer.Argument(help="Text of `nvidia-smi topo -m`, or NCCL's topology XML.")],
    out: Annotated[Path, typer.Option("--out", help="Where the cluster file goes (YAML).")],
    nodes: Annotated[int, typer.Option(help="How many such nodes there are.")] = 1,
) -> None:
    """Make a cluster file from what a node says about itself, to be edited.

    Example: `nvidia-smi topo -m > topo.txt; expertier place cluster topo.txt --nodes 4 --out cluster.yaml`
    """
    import yaml
    from rich.console import Console

    from routing.ground.files import atomic_write

    from .cluster import Cluster
    from .topology import read_nccl_topology, read_nvidia_smi_topo

    found = (read_nccl_topology if file.suffix == ".xml" else read_nvidia_smi_topo)(file, nodes=nodes)
    cluster = Cluster.from_mapping(found, str(file))
    with atomic_write(out) as target:
        yaml.safe_dump(found, target, sort_keys=False)
    Console().print(f"wrote {out}: {cluster.num_gpus} GPUs on {cluster.num_nodes} node(s)", highlight=False)


@app.command("export")
def export_command(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    format_name: Annotated[str, typer.Option("--format", help="The engine: sglang, ...")],
    out: Annotated[Path, typer.Option("--out", help="Where the engine's file goes.")],
) -> None:
    """Write a plan as a serving engine loads it, and check the file as the engine would read it.

    Example: `expertier place export plan.json --format sglang --out experts.json`
    """
    from rich.console import Console

    from .formats import export_plan
    from .plan import Plan

    require_folder(out)
    export_plan(Plan.load(plan_file), format_name, out)
    Console().print(f"wrote {out} for {format_name}", highlight=False)


@app.command("loads")
def loads_command(
    source: Annotated[Path, typer.Argument(help="What an engine recorded: a file, or a folder of files.")],
    format_name: Annotated[str, typer.Option("--format", help="sglang, tensorrt-llm or vllm.")],
    out: Annotated[Path, typer.Option("--out", help='Where the loads go (JSON with "logical_count").')],
) -> None:
    """Turn an engine's expert statistics into a loads file.

    Example: `expertier place loads expert_distribution_recorder.pt --format sglang --out loads.json`
    """
    from rich.console import Console

    from routing.ground.files import write_json

    from .load_importers import import_loads

    load = import_loads(source, format_name)
    write_json(out, {"logical_count": load.tolist()})
    Console().print(f"wrote {out}: {load.shape[0]} layers x {load.shape[1]} experts", highlight=False)


@app.command("migrate")
def migrate_command(
    current: Annotated[Path, typer.Argument(help="The plan that runs now.")],
    target: Annotated[Path, typer.Argument(help="The plan to go to; it may have more or fewer GPUs.")],
    out: Annotated[Path, typer.Option("--out", help="Where the ordered steps go (JSON).")],
    plan_out: Annotated[Path | None, typer.Option(help="Where the target with its GPUs renumbered goes.")] = None,
) -> None:
    """Order the transfers from one plan to another so that every expert always has a live copy.

    Example: `expertier place migrate plan32.json plan40.json --out steps.json --plan-out plan40b.json`
    """
    from rich.console import Console

    from routing.ground.files import write_json

    from .elastic import migrate, replay
    from .plan import Plan

    require_folder(out, plan_out)
    running = Plan.load(current)
    found = migrate(running, Plan.load(target))
    for _ in replay(running, found):
        pass
    steps = [{"kind": type(step).__name__.lower(), **vars(step)} for step in found.steps]
    totals = {name: getattr(found, name) for name in ("moved_bytes", "node_crossing_bytes", "peak_extra_bytes")}
    write_json(out, {**totals, "steps": steps})
    if plan_out:
        found.plan.save(plan_out)
    Console().print(
        f"wrote {out}: {len(steps)} steps, {found.moved_bytes / 1e9:.3g} GB moved "
        f"({found.node_crossing_bytes / 1e9:.3g} GB between nodes), "
        f"{found.peak_extra_bytes / 1e6:.3g} MB extra at most",
        highlight=False,
    )


@app.command("tiers")
def tiers_command(
    hardware: Annotated[Path, typer.Option(help="hardware.toml, as `expertier calibrate` writes it.")],
    out: Annotated[Path, typer.Option("--out", help="Where the plan goes (JSON).")],
    expert_size: Annotated[str, typer.Option(help="Bytes of one expert of one layer, for instance 26MB.")],
    trace: TraceOption = None,
    loads: LoadsOption = None,
    rows: RowsOption = None,
    gpu_memory: Annotated[str, typer.Option(help="For experts, for instance 8GiB.")] = "0",
    cpu_memory: Annotated[str, typer.Option(help="For experts, for instance 24GiB.")] = "0",
    robust: Annotated[bool, typer.Option(help="Count each expert's worst scenario.")] = False,
) -> None:
    """Place experts over GPU, CPU and SSD of one machine by expected seconds per decoded token.

    Example: `expertier place tiers --trace t.npz --hardware hw.toml --expert-size 26MB --cpu-memory 8GiB --out p.json`
    """
    import numpy as np
    from rich.console import Console

    from routing.ground.quantity import parse_bytes

    from .cluster import Cluster
    from .tiers import load_machine, place_tiers

    require_folder(out)
    machine = load_machine(hardware, gpu_memory=gpu_memory, cpu_memory=cpu_memory)
    problem = read_problem(trace, loads, rows, Cluster.grid(1, 1), 0)
    plan = place_tiers(problem, machine, np.full(problem.num_layers, parse_bytes(expert_size)), robust=robust)
    plan.save(out)
    assert plan.tier_LE is not None
    counts = np.bincount(plan.tier_LE.ravel(), minlength=3).tolist()
    Console().print(
        f"wrote {out}: {counts[0]} experts on GPU, {counts[1]} in RAM, {counts[2]} on SSD; "
        f"{plan.metadata['seconds_per_token'] * 1e3:.3g} ms of expert reads per token expected",
        highlight=False,
    )


@app.command("report")
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
    from rich.console import Console

    from .plan import Plan
    from .report import write_report

    require_folder(out)
    plan = Plan.load(plan_file)
    problem = read_problem(trace, loads, rows, plan.cluster, plan.num_slots - plan.num_experts, plan)
    write_report(problem, plan, out, with_pareto=pareto)
    Console().print(f"wrote {out}", highlight=False)


def _report(found: dict[str, Any]) -> dict[str, Any]:
    first = ("objective", "bound", "gap", "balancedness", "gpu_fanout", "node_fanout", "seconds")
    return {key: found[key] for key in first} | {key: value for key, value in found.items() if key not in first}
