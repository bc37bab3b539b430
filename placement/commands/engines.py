"""`expertier place export`, `import` and `loads`: a serving engine's files, read and written."""

from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_outputs
from routing.ground.terminal import plain_console


def export_command(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    format_name: Annotated[str, typer.Option("--format", help="The engine: sglang, ...")],
    out: Annotated[Path, typer.Option("--out", help="Where the engine's file goes.")],
    extra_layers: Annotated[
        int, typer.Option(min=0, help="MoE layers of draft (MTP) modules behind the decoder, in the initial layout.")
    ] = 0,
) -> None:
    """Write a plan as a serving engine loads it, and check the file as the engine would read it.

    Example: `expertier place export plan.json --format sglang --out experts.json`
    """
    from ..contract.plan import Plan
    from ..formats import export_plan

    expect_outputs(out, inputs=[plan_file])
    usage = export_plan(Plan.load(plan_file), format_name, out, extra_layers=extra_layers)
    console = plain_console(soft_wrap=True)
    console.print(f"wrote {out} for {format_name}")
    console.print(f"use it with {usage}")


def import_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The map of an engine.")],
    format_name: Annotated[str, typer.Option("--format", help="hygon or lplb.")],
    cluster: Annotated[Path, typer.Option("--cluster", help="The cluster file (YAML) of the machines that it is for.")],
    out: Annotated[Path, typer.Option("--out", help="Where the plan goes (JSON).")],
) -> None:
    """Turn an engine's map into a plan, to score it, to compare with it or to migrate from it.

    Example: `expertier place import lplb.json --format lplb --cluster c.yaml --out plan.json`
    """
    from ..contract.cluster import load_cluster
    from ..formats.importing import import_plan

    expect_outputs(out, inputs=[file, cluster])
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    plan = import_plan(file, format_name, load_cluster(cluster))
    plan.save(out)
    plain_console(soft_wrap=True).print(
        f"wrote {out}: {plan.num_layers} layers x {plan.num_slots} slots of {plan.num_experts} experts on "
        f"{plan.cluster.num_gpus} GPUs"
    )


def loads_command(
    source: Annotated[Path, typer.Argument(help="What an engine recorded: a file, or a folder of files.")],
    format_name: Annotated[str, typer.Option("--format", help="sglang, tensorrt-llm or vllm.")],
    out: Annotated[Path, typer.Option("--out", help='Where the loads go (JSON with "logical_count").')],
) -> None:
    """Turn an engine's expert statistics into a loads file.

    Example: `expertier place loads expert_distribution_recorder.pt --format sglang --out loads.json`
    """
    from routing.ground.files import write_json

    from ..data.load_importers import import_load_file

    expect_outputs(out, inputs=[source])
    found = import_load_file(source, format_name)
    layers = {} if found.layer_ids is None else {"layer_ids": list(found.layer_ids)}
    write_json(out, {"logical_count": found.load_LE.tolist(), **layers})
    rows, experts = found.load_LE.shape
    moe = "" if found.layer_ids is None else f", of which {len(found.layer_ids)} were recorded"
    plain_console().print(f"wrote {out}: {rows} layers x {experts} experts{moe}")
