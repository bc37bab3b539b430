"""`expertier trace`: look at routing traces."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from .ground.expect import expect_outputs
from .ground.files import write_json
from .ground.terminal import plain_console
from .report.tables import print_report
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
    from .report.locality import balance, locality

    expect_outputs(plot, json_file, inputs=[file])
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
    layers = balance(trace)
    found = locality(trace.rows(0, rows))
    layers = [{**layer, **more} for layer, more in zip(layers, found.pop("per_layer"), strict=True)]
    report = {**summary, "rows": min(rows, trace.num_tokens), **found, "per_layer": layers}
    print_report(report)
    if plot:
        from .report.figure import draw

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

    expect_outputs(out, inputs=[file])
    trace = import_trace(file, format_name, num_experts=num_experts, top_k=top_k)
    trace.save(out)
    plain_console().print(
        f"wrote {out}: {trace.num_tokens} tokens, {trace.num_layers} MoE layers, {trace.num_experts} experts, "
        f"top-{trace.top_k}",
        highlight=False,
    )
