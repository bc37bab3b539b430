"""`expertier place tiers` and `part`: experts over GPUs, host memories and SSDs of one machine or of a cluster."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from routing.ground.expect import expect_outputs

from .options import JsonOption, LoadsOption, RowsOption, TraceOption

if TYPE_CHECKING:
    from ..contract.cluster import Cluster
    from ..contract.plan import Plan
    from ..contract.problem import Problem
    from ..data.model_folder import ModelExperts


def tiers_command(
    out: Annotated[Path, typer.Option("--out", help="Where the plan goes (JSON).")],
    model: Annotated[
        Path | None, typer.Argument(metavar="[MODEL]", help="A checkpoint's folder: sizes are read from its headers.")
    ] = None,
    hardware: Annotated[
        Path | None, typer.Option(help="One machine: hardware.toml, as `expertier calibrate` writes it.")
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option(help="Nodes with GPUs, dram and ssd: the cluster file (YAML).")
    ] = None,
    expert_size: Annotated[str | None, typer.Option(help="Bytes of one expert of one layer, such as 26MB.")] = None,
    trace: TraceOption = None,
    loads: LoadsOption = None,
    rows: RowsOption = None,
    gpu_memory: Annotated[str, typer.Option(help="With --hardware: for experts, for instance 8GiB.")] = "0",
    cpu_memory: Annotated[str, typer.Option(help="With --hardware: for experts, for instance 24GiB.")] = "0",
    batch: Annotated[int | None, typer.Option(min=1, help="Tokens of one decode step over all GPUs.")] = None,
    chunk: Annotated[int | None, typer.Option(min=1, help="Tokens of one prefill chunk.")] = None,
    robust: Annotated[bool, typer.Option(help="With --hardware: count each expert's worst scenario.")] = False,
    solver: Annotated[str, typer.Option(help="With --cluster: auto, search or ilp.")] = "auto",
    time_limit: Annotated[float, typer.Option(help="With --cluster: wall time in seconds.")] = 60.0,
    seed: Annotated[int, typer.Option(help="Decides every random choice.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Place experts over GPUs, host memories and SSDs by modelled seconds per step, with a certificate.

    Example: `expertier place tiers --trace t.npz --cluster c.yaml --batch 16 --out plan.json`
    """
    from ..data.model_folder import read_model_experts
    from .tier_report import print_tiers

    expect_outputs(out, json_file, inputs=[model, hardware, cluster, trace, *(loads or ())])
    if (hardware is None) == (cluster is None):
        raise ValueError("give either --hardware FILE (one machine) or --cluster FILE (nodes)")
    found = None if model is None else read_model_experts(model)
    steps = {"batch": batch, "chunk": chunk}
    if hardware is not None:
        budgets = {"gpu_memory": gpu_memory, "cpu_memory": cpu_memory}
        machine, size = _machine(hardware, budgets), _size(expert_size, found, None)
        problem = _read(trace, loads, rows, _with_steps(machine, steps), found)
        plan = _on_hardware(problem, hardware, budgets, size, robust) if not batch and not chunk else None
    else:
        assert cluster is not None
        plan, problem = None, _cluster_problem(cluster, steps, trace, loads, rows, found)
        size = _size(expert_size, found, problem.cluster)
    if plan is None:
        plan = _solve(problem, size, solver, time_limit, seed)
    plan.save(out)
    print_tiers(plan, out, json_file)
    if trace is not None or loads:
        _warn(problem)


def solve_in_tiers(
    problem: "Problem",
    chosen: dict[str, Any],
    time_limit: float,
    seed: int,
    out: Path,
    json_file: Path | None,
) -> None:
    """What `place solve` does where the experts do not fit on the GPUs: the rest goes to lower tiers.

    Args:
        problem: its cluster has lower tiers.
        chosen: options of `place solve` that tiers do not know; one that was given is refused.
        time_limit, seed, out, json_file: as for `place tiers`.
    """
    from routing.ground.terminal import plain_console

    from .tier_report import print_tiers

    if given := [f"--{name.replace('_', '-')}" for name, value in chosen.items() if value not in (None, "balance")]:
        raise ValueError(
            f"the experts do not fit on the GPUs, and {given[0]} is of plans that keep all of them there; leave it out "
            "to use host memory and SSDs too, or take more GPUs"
        )
    plain_console().print("note: the experts do not fit on the GPUs; the rest goes to host memory and SSDs")
    plan = _solve(problem, None, "auto", time_limit, seed)
    plan.save(out)
    print_tiers(plan, out, json_file)
    _warn(problem)


def part_command(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan of several nodes, of `place tiers`.")],
    node: Annotated[int, typer.Option(min=0, help="Which node, from 0 on.")],
    out: Annotated[Path, typer.Option("--out", help="Where the node's plan goes (JSON).")],
) -> None:
    """Take one node's part of a plan of several nodes, as `expertier generate --plan` loads it there.

    Example: `expertier place part plan.json --node 1 --out node1.json`
    """
    from ..contract.parts import node_part
    from ..contract.plan import Plan
    from .tier_report import print_tiers

    expect_outputs(out, inputs=[plan_file])
    part = node_part(Plan.load(plan_file), node)
    part.save(out)
    print_tiers(part, out, None)


def _warn(problem: "Problem") -> None:
    """Tell signs that the planning data are not what the plan will meet."""
    from routing.ground.terminal import plain_console

    from ..data.suspicion import has_domains, planning_notes

    loads = {scenario.name: scenario.load_LE for scenario in problem.scenarios}
    for note in planning_notes(loads, is_broad=has_domains(scenario.trace for scenario in problem.scenarios)):
        plain_console().print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)


def _machine(hardware: Path, budgets: dict[str, str]) -> "Cluster":
    from ..contract.cluster import Cluster
    from ..solving.machine import load_machine, machine_cluster

    return machine_cluster(load_machine(hardware, **budgets), Cluster.grid(1, 1))


def _with_steps(cluster: "Cluster", steps: dict[str, int | None]) -> "Cluster":
    from dataclasses import replace

    given: dict[str, Any] = {name: tokens for name, tokens in steps.items() if tokens is not None}
    return replace(cluster, tiers=cluster.tiers.model_copy(update=given)) if given else cluster


def _cluster_problem(
    cluster: Path,
    steps: dict[str, int | None],
    trace: Path | None,
    loads: list[Path] | None,
    rows: str | None,
    found: "ModelExperts | None",
) -> "Problem":
    from ..contract.cluster import load_cluster

    return _read(trace, loads, rows, _with_steps(load_cluster(cluster), steps), found)


def _read(
    trace: Path | None, loads: list[Path] | None, rows: str | None, cluster: "Cluster", found: "ModelExperts | None"
) -> "Problem":
    """The problem of the data; of the model's sizes alone, every expert counts alike."""
    from .inputs import even_problem, read_problem

    if trace is None and not loads and found is not None:
        return even_problem(cluster, found)
    return read_problem(trace, loads, rows, cluster, None, spare_slots=True)


def _size(text: str | None, found: "ModelExperts | None", cluster: "Cluster | None") -> Any:
    """Bytes of one expert, or of one of each layer; None leaves it to the cluster file."""
    import numpy as np

    from routing.ground.quantity import parse_size

    if text is not None:
        return float(parse_size(text))
    if found is not None:
        return np.array(found.expert_bytes)
    if cluster is None:
        raise ValueError("give --expert-size, or the MODEL's folder, so that the size of an expert is known")
    return None


def _on_hardware(problem: "Problem", hardware: Path, budgets: dict[str, str], size: Any, robust: bool) -> "Plan":
    from ..solving.machine import load_machine
    from ..solving.tiers import place_tiers

    return place_tiers(problem, load_machine(hardware, **budgets), size, robust=robust)


def _solve(problem: "Problem", size: Any, solver: str, time_limit: float, seed: int) -> "Plan":
    from ..solving.cluster_tiers import solve_cluster_tiers
    from .progress import solving

    with solving() as progress:
        return solve_cluster_tiers(
            problem, expert_bytes=size, solver=solver, time_limit_s=time_limit, seed=seed, progress=progress
        )
