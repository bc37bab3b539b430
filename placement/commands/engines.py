"""`expertier place export`, `loads` and `cluster`: a serving engine's files, read and written."""

from pathlib import Path
from typing import Annotated

import typer

from .inputs import require_folder


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

    from ..contract.cluster import Cluster
    from ..data.topology import read_nccl_topology, read_nvidia_smi_topo

    found = (read_nccl_topology if file.suffix == ".xml" else read_nvidia_smi_topo)(file, nodes=nodes)
    cluster = Cluster.from_mapping(found, str(file))
    with atomic_write(out) as target:
        yaml.safe_dump(found, target, sort_keys=False)
    Console().print(f"wrote {out}: {cluster.num_gpus} GPUs on {cluster.num_nodes} node(s)", highlight=False)


def export_command(
    plan_file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file.")],
    format_name: Annotated[str, typer.Option("--format", help="The engine: sglang, ...")],
    out: Annotated[Path, typer.Option("--out", help="Where the engine's file goes.")],
) -> None:
    """Write a plan as a serving engine loads it, and check the file as the engine would read it.

    Example: `expertier place export plan.json --format sglang --out experts.json`
    """
    from rich.console import Console

    from ..contract.plan import Plan
    from ..formats import export_plan

    require_folder(out)
    export_plan(Plan.load(plan_file), format_name, out)
    Console().print(f"wrote {out} for {format_name}", highlight=False)


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

    from ..data.load_importers import import_loads

    load = import_loads(source, format_name)
    write_json(out, {"logical_count": load.tolist()})
    Console().print(f"wrote {out}: {load.shape[0]} layers x {load.shape[1]} experts", highlight=False)
