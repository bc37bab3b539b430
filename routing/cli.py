"""`expertier trace`: look at routing traces."""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from .traces import RoutingTrace, entropy_L, load_LE, reuse_distance_TK, skew_L, write_json

trace_app = typer.Typer(help="Record and look at routing traces.", no_args_is_help=True)


@trace_app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="A routing trace (.npz).")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the table as JSON.")] = None,
) -> None:
    """Print what a trace says about balance and reuse, layer by layer.

    Example: `expertier trace show routing.npz`
    """
    trace = RoutingTrace.load(file)
    load = load_LE(trace)
    layers = [
        {
            "layer": layer,
            "skew": float(skew),
            "entropy": float(entropy),
            "dead_experts": int((load[layer] == 0).sum()),
            "median_reuse_distance": _median_reuse(trace, layer),
        }
        for layer, (skew, entropy) in enumerate(zip(skew_L(load), entropy_L(load), strict=True))
    ]
    summary = {
        "tokens": trace.num_tokens,
        "sequences": len(np.unique(trace.sequence_T)),
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "metadata": trace.metadata,
    }
    _print(summary, layers)
    if json_file:
        write_json(json_file, {**summary, "per_layer": layers})


@trace_app.command("import")
def import_command(
    file: Annotated[Path, typer.Argument(help="What another program recorded: a file, or a folder of files.")],
    format_name: Annotated[str, typer.Option("--format", help="sglang, vllm, megatron, hf-logits, exflow, csv, npz.")],
    out: Annotated[Path, typer.Option("--out", help="Where the trace goes (.npz).")],
    num_experts: Annotated[int | None, typer.Option(help="E, if the recording does not show all.")] = None,
    top_k: Annotated[int | None, typer.Option(help="K, for router logits.")] = None,
) -> None:
    """Turn another program's recording into a routing trace.

    Example: `expertier trace import routing.jsonl --format megatron --out routing.npz`
    """
    from .traces.importers import import_trace

    trace = import_trace(file, format_name, num_experts=num_experts, top_k=top_k)
    trace.save(out)
    Console().print(
        f"wrote {out}: {trace.num_tokens} tokens, {trace.num_layers} MoE layers, {trace.num_experts} experts, "
        f"top-{trace.top_k}",
        highlight=False,
    )


def _median_reuse(trace: RoutingTrace, layer: int) -> float | None:
    distance_TK = reuse_distance_TK(trace, layer)
    reused = distance_TK[distance_TK >= 0]
    return float(np.median(reused)) if reused.size else None


def _print(summary: dict[str, object], layers: list[dict[str, object]]) -> None:
    console = Console()
    console.print(
        f"{summary['tokens']} tokens in {summary['sequences']} sequences, {summary['layers']} MoE layers, "
        f"{summary['experts']} experts, top-{summary['top_k']}  {json.dumps(summary['metadata'])}",
        highlight=False,
    )
    table = Table("layer", "max/mean load", "entropy / log E", "dead experts", "median reuse distance")
    for row in layers:
        reuse = row["median_reuse_distance"]
        table.add_row(
            str(row["layer"]),
            f"{row['skew']:.2f}",
            f"{row['entropy']:.3f}",
            str(row["dead_experts"]),
            "-" if reuse is None else f"{reuse:.0f}",
        )
    console.print(table)
