"""`expertier place tiers`: experts over GPU, CPU and SSD of one machine."""

from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_outputs

from .inputs import read_problem
from .options import LoadsOption, RowsOption, TraceOption


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
    from routing.ground.quantity import format_size, parse_size
    from routing.ground.terminal import plain_console

    from ..contract.cluster import Cluster
    from ..solving.tiers import load_machine, place_tiers, tier_counts

    expect_outputs(out, inputs=[hardware, trace, *(loads or ())])
    size = parse_size(expert_size)
    machine = load_machine(hardware, gpu_memory=gpu_memory, cpu_memory=cpu_memory)
    problem = read_problem(trace, loads, rows, Cluster.grid(1, 1), 0)
    plan = place_tiers(problem, machine, float(size), robust=robust)
    plan.save(out)
    on_gpu, in_memory, on_ssd = (f"{count} ({format_size(count * size)})" for count in tier_counts(plan))
    plain_console().print(
        f"wrote {out}: experts on GPU {on_gpu}, in RAM {in_memory}, on SSD {on_ssd}; "
        f"{plan.metadata['seconds_per_token'] * 1e3:.3g} ms of expert reads per token expected",
        highlight=False,
    )
