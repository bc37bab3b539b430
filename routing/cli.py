"""`expertier trace`: look at routing traces."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from .ground.files import write_json
from .traces import RoutingTrace

trace_app = typer.Typer(help="Record and look at routing traces.", no_args_is_help=True)


@trace_app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="A routing trace (.npz).")],
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows that SRP, SCH and hit rates look at.")] = 4096,
    plot: Annotated[Path | None, typer.Option("--plot", help="Also draw them into this file (.png, .svg, ..).")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the numbers as JSON.")] = None,
) -> None:
    """Print what a trace says about balance, reuse and locality, layer by layer.

    SRP is how well one set of experts serves the next m tokens (best F1), SCH the hit rate of a cache that knows the
    next 16 tokens. Balance and reuse are those of the whole trace, the rest that of its first rows.

    Example: `expertier trace show routing.npz --plot locality.png`
    """
    from . import trace_report

    for out in (plot, json_file):
        if out is not None and not out.absolute().parent.is_dir():
            raise ValueError(f"cannot write {out}: the folder {out.absolute().parent} does not exist; create it first")
    trace = RoutingTrace.load(file)
    if not trace.num_tokens:
        raise ValueError(f"trace {file}: it has no rows")
    summary = {
        "tokens": trace.num_tokens,
        "sequences": len(np.unique(trace.sequence_T)),
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "metadata": trace.metadata,
    }
    layers = trace_report.balance(trace)
    found = trace_report.locality(trace.rows(0, rows))
    layers = [{**layer, **more} for layer, more in zip(layers, found.pop("per_layer"), strict=True)]
    report = {**summary, "rows": min(rows, trace.num_tokens), **found, "per_layer": layers}
    _print(report)
    if plot:
        from .trace_figure import draw

        draw(plot, report)
    if json_file:
        write_json(json_file, report)


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


def _print(report: dict[str, Any]) -> None:
    console = Console()
    console.print(
        f"{report['tokens']} tokens in {report['sequences']} sequences, {report['layers']} MoE layers, "
        f"{report['experts']} experts, top-{report['top_k']}  {json.dumps(report['metadata'])}",
        highlight=False,
    )
    console.print(_balance_table(report))
    console.print(_locality_table(report))
    for table in _locality_tables(report):
        console.print(table)


def _balance_table(report: dict[str, Any]) -> Table:
    table = Table("layer", "max/mean load", "entropy / log E", "dead experts", "median reuse distance")
    for row in report["per_layer"]:
        reuse = row["median_reuse_distance"]
        table.add_row(
            str(row["layer"]),
            f"{row['skew']:.2f}",
            f"{row['entropy']:.3f}",
            str(row["dead_experts"]),
            "-" if reuse is None else f"{reuse:.0f}",
        )
    return table


def _locality_table(report: dict[str, Any]) -> Table:
    """One row per layer, of the window, the ratio and the size nearest to 16 tokens and twice one token's need."""
    windows = list(report["srp"])
    window = "16" if "16" in windows else windows[-1] if windows else None
    ratio = "2" if "2" in report["sch"] else list(report["sch"])[-1]
    size = min(report["hit_rate"], key=lambda size: abs(int(size) - float(ratio) * report["top_k"]))
    columns = ["layer", *([f"SRP, m = {window}"] if window else []), f"SCH, {ratio} x K slots"]
    table = Table(*columns, f"LRU, {size} slots", f"Belady, {size} slots", title=f"per layer, {report['rows']} rows")
    for row in report["per_layer"]:
        values = [row["srp"][window]["f1"]] if window else []
        values += [row["sch"][ratio]["16"], *(row["hit_rate"][size][name] for name in ("lru", "belady"))]
        table.add_row(str(row["layer"]), *(f"{value:.3f}" for value in values))
    return table


def _locality_tables(report: dict[str, Any]) -> Iterator[Table]:
    """All layers together, over the first rows."""
    title = f"all layers, {report['rows']} rows"
    table = Table("window m", "SRP (best F1)", "experts kept / needed", title=title)
    for window, result in report["srp"].items():
        table.add_row(window, f"{result['f1']:.3f}", f"{result['cache_ratio']:.2f}")
    if report["srp"]:
        yield table
    table = Table("cache / one token's need", "SCH, knows 16 tokens", "SCH, knows all", title=title)
    for ratio, rates in report["sch"].items():
        table.add_row(ratio, f"{rates['16']:.3f}", f"{rates['all']:.3f}")
    yield table
    table = Table("slots per layer", "LRU", "most used", "Belady", title=title)
    for size, rates in report["hit_rate"].items():
        table.add_row(size, *(f"{rates[name]:.3f}" for name in ("lru", "most_used", "belady")))
    yield table
