"""`expertier place cluster` and `speeds`: cluster files from what machines say, and from what was measured on them."""

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


def speeds_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="CSV or JSON with gpu, batch, seconds of one expert.")],
    cluster: Annotated[Path, typer.Option("--cluster", help="The cluster file (YAML) whose GPUs were measured.")],
    out: Annotated[Path, typer.Option("--out", help="Where the new cluster file goes (YAML).")],
) -> None:
    """Put measured seconds per expert into a cluster file: curves of GPU types, or of single GPUs by rank.

    Example: `expertier place speeds measured.csv --cluster c.yaml --out measured.yaml`
    """
    import yaml

    from routing.ground.files import atomic_write

    from ..contract.cluster import Cluster, load_cluster
    from ..data.speeds import read_speeds, with_speeds

    expect_outputs(out, inputs=[file, cluster])
    load_cluster(cluster)  # so that what follows may rely on its schema
    found, notes = with_speeds(yaml.safe_load(cluster.read_text(encoding="utf-8")), read_speeds(file))
    machines = Cluster.from_mapping(found, str(out))
    with atomic_write(out) as target:
        yaml.safe_dump(found, target, sort_keys=False, width=120)
    console = plain_console(soft_wrap=True)
    for note in notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    measured = sum(bool(curve) for curve in machines.curves)
    console.print(f"wrote {out}: curves of {measured} of {machines.num_gpus} GPUs")
