"""`expertier place`: solve, score and export expert placements."""

from pathlib import Path
from typing import Annotated, Any

import typer

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
    objective: Annotated[str, typer.Option(help="balance, fanout, fanout+balance, hops, latency, ...")] = "balance",
    replicas: Annotated[int | None, typer.Option(help="Extra slots per layer.")] = None,
    solver: Annotated[str, typer.Option(help="auto, search, ilp, eplb, lpt, contiguous, ...")] = "auto",
    time_limit: Annotated[float, typer.Option(help="Seconds for the solver.")] = 30.0,
    seed: Annotated[int, typer.Option(help="For every random choice.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Place experts on a cluster, print how good that is and could be, write the plan.

    Example: `expertier place solve --trace t.npz --cluster c.yaml --objective fanout+balance --out plan.json`
    """
    from routing.traces import write_json

    from .cluster import load_cluster
    from .progress import solving
    from .solvers import solve
    from .terminal import print_certificate

    _require_folder(out, json_file)
    problem = _problem(trace, loads, rows, load_cluster(cluster), replicas)
    with solving() as progress:
        plan = solve(problem, objective=objective, solver=solver, time_limit_s=time_limit, seed=seed, progress=progress)
    plan.save(out)
    assert plan.certificate is not None
    print_certificate(plan, out)
    if json_file:
        write_json(json_file, _report(plan.certificate.to_json() | plan.certificate.in_sample))


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
    from routing.traces import write_json

    from .plan import Plan
    from .scoring import score
    from .terminal import print_score

    _require_folder(json_file)
    plan = Plan.load(plan_file)
    problem = _problem(trace, loads, rows, plan.cluster, plan.num_slots - plan.num_experts, plan)
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

    from routing.traces import atomic_write

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

    _require_folder(out)
    export_plan(Plan.load(plan_file), format_name, out)
    Console().print(f"wrote {out} for {format_name}", highlight=False)


def _problem(
    trace: Path | None, loads: list[Path] | None, rows: str | None, cluster: Any, replicas: int | None, plan: Any = None
) -> Any:
    from routing.traces import RoutingTrace

    from .loads import read_loads
    from .problem import Problem

    if (trace is None) == (not loads):
        raise ValueError("give either --trace FILE or --loads FILE (once or more)")
    if loads:
        if rows is not None:
            raise ValueError("--rows chooses rows of a trace; it does not go with --loads")
        return Problem.from_loads(_named_loads(loads, read_loads, plan), cluster, replicas=replicas)
    assert trace is not None
    data = RoutingTrace.load(trace)
    return Problem.from_trace(_select_rows(data, rows), cluster, replicas=replicas)


def _named_loads(loads: list[Path], read_loads: Any, plan: Any) -> dict[str, Any]:
    """Loads by file name; for a plan, only its layers count, so that an idle layer is not taken for a dense one."""
    named = {str(path): read_loads(path) for path in loads}
    for path, load in named.items():
        if plan is not None and load.shape[0] == plan.hidden_layers:
            unused = load[list(plan.layer_ids)].sum(axis=1) == 0
            if unused.any():
                raise ValueError(f"{path}: layer {plan.layer_ids[int(unused.argmax())]} of the plan has no load there")
    return named


def _select_rows(data: Any, rows: str | None) -> Any:
    if rows is None:
        chosen = data
    else:
        parts = rows.split(":")
        try:
            start, stop = (int(part) if part else None for part in parts)
        except ValueError:
            raise ValueError(f"--rows must look like 0:20000; got {rows!r}") from None
        chosen = data.rows(start, stop)
    if chosen.num_tokens == 0:
        raise ValueError(f"no rows left: the trace has {data.num_tokens}, --rows is {rows}")
    return chosen


def _require_folder(*files: Path | None) -> None:
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise ValueError(f"cannot write {file}: the folder {file.parent} does not exist; create it first")


def _report(found: dict[str, Any]) -> dict[str, Any]:
    first = ("objective", "bound", "gap", "balancedness", "gpu_fanout", "node_fanout", "seconds")
    return {key: found[key] for key in first} | {key: value for key, value in found.items() if key not in first}
