"""`expertier place export`, `loads` and `cluster`: a serving engine's files, read and written."""

from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_outputs
from routing.ground.terminal import plain_console


def cluster_command(
    out: Annotated[Path, typer.Option("--out", help="Where the cluster file goes (YAML).")],
    file: Annotated[
        Path | None, typer.Argument(help="Text of `nvidia-smi topo -m`, or the XML of NCCL_TOPO_DUMP_FILE.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A known machine: hgx-h100, gb200-nvl72, gb300, mi355x.")
    ] = None,
    nodes: Annotated[int, typer.Option(help="How many such nodes there are.")] = 1,
    nvlink: Annotated[
        str | None, typer.Option(metavar="RATE", help="All NVLinks of one GPU, one direction, such as 900GB/s.")
    ] = None,
    nic: Annotated[str | None, typer.Option(metavar="RATE", help="One network card, such as 400Gb/s.")] = None,
    nvlink_domain: Annotated[
        int | None, typer.Option(metavar="GPUS", help="GPUs that NVLink joins across nodes, such as 72.")
    ] = None,
) -> None:
    """Make a cluster file from what a node says about itself, to be edited.

    What the node does not say is guessed; each guess is printed and stands in the file under `guessed`.

    Example: `(nvidia-smi -L; nvidia-smi topo -m) > topo.txt; expertier place cluster topo.txt --nodes 4 --out c.yaml`
    """
    import yaml

    from routing.ground.files import atomic_write
    from routing.ground.quantity import parse_bytes_per_s

    from ..contract.cluster import Cluster
    from ..data.presets import preset_cluster
    from ..data.topology import TopologyOptions, read_topology

    if (file is None) == (preset is None):
        raise ValueError("give either a FILE that describes a node, or --preset NAME")
    expect_outputs(out, inputs=[file])
    rates = {"nvlink": nvlink, "nic": nic}
    given = {f"{name}_bytes_per_s": parse_bytes_per_s(rate) for name, rate in rates.items() if rate is not None}
    if bad := [name for name, rate in given.items() if rate < 1e6]:
        raise ValueError(f"--{bad[0].partition('_')[0]} needs a unit, such as 400Gb/s or 900GB/s")
    if file is not None:
        found = read_topology(file, TopologyOptions(nodes=nodes, domain_gpus=nvlink_domain, **given))
    else:
        assert preset is not None
        if nvlink_domain is not None:
            raise ValueError("--nvlink-domain is of a FILE; in a preset every domain is one of the --nodes")
        found = preset_cluster(preset, nodes, **given)
    cluster = Cluster.from_mapping(found, str(file or preset))
    with atomic_write(out) as target:
        yaml.safe_dump(found, target, sort_keys=False, width=120)
    console = plain_console(soft_wrap=True)
    for guess in found.get("guessed", []):
        console.print(f"guessed: {guess}")
    console.print(f"wrote {out}: {cluster.num_gpus} GPUs on {cluster.num_nodes} node(s)")


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
