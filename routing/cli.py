"""`expertier trace`: look at routing traces."""

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from .ground.expect import expect_outputs
from .ground.files import write_json
from .report.tables import print_import, print_report
from .traces import IMPORTERS, RoutingTrace, import_trace

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
        raise ValueError(
            f"trace {file}: it has no rows ({trace.num_layers} layers, {trace.num_experts} experts); record more tokens"
        )
    summary = {
        "tokens": trace.num_tokens,
        "sequences": len(np.unique(trace.sequence_T)),
        "layers": trace.num_layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
        "layer_ids": None if trace.layer_ids is None else list(trace.layer_ids),
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


def _formats() -> str:
    """The formats, a paragraph each, for the help of `trace import`."""
    return "\n\n".join(f"{row.name}: {row.reads}." for row in IMPORTERS.values())


@trace_app.command("import", epilog=_formats())
def import_command(
    file: Annotated[Path, typer.Argument(help="What another program recorded: a file, or a folder of files.")],
    out: Annotated[Path, typer.Option("--out", help="Where the trace goes (.npz).")],
    format_name: Annotated[str, typer.Option("--format", help=f"auto (by content), {', '.join(IMPORTERS)}.")] = "auto",
    num_experts: Annotated[int | None, typer.Option(help="E, if the recording does not say it.")] = None,
    top_k: Annotated[int | None, typer.Option(help="K, for router logits and SGLang's responses.")] = None,
    zero_experts: Annotated[int, typer.Option(help="Ids from E on that compute nothing; they become empty.")] = 0,
    pipeline_stages: Annotated[int | None, typer.Option(help="Stages of a Megatron run.")] = None,
) -> None:
    """Turn another program's recording into a routing trace, and say what was read and what was left out.

    Example: `expertier trace import routing.jsonl --out routing.npz`
    """
    expect_outputs(out, inputs=[file])
    trace = import_trace(
        file,
        format_name,
        num_experts=num_experts,
        top_k=top_k,
        zero_experts=zero_experts,
        pipeline_stages=pipeline_stages,
    )
    trace.save(out)
    print_import(trace, out)
