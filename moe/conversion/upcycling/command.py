"""`expertier upcycle`: a dense model as a mixture of experts."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from routing.ground.expect import expect_new, expect_outputs
from routing.ground.files import write_json

from ..flags import from_flags, with_flags
from ..opening import plain_folder
from .upcycle import UpcyclePlan
from .upcycle import upcycle as run


@with_flags(UpcyclePlan)
def upcycle(
    model: Annotated[Path, typer.Argument(metavar="DENSE", help="A dense checkpoint folder, or a GGUF file of one.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist yet.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report as JSON.")] = None,
    **flags: Any,
) -> None:
    """Turn a dense model into a mixture of experts that computes the same, to train on from there.

    Example: `expertier upcycle Qwen3-0.6B --experts 8 --top-k 2 --out qwen3-8x`
    """
    expect_new(out)
    expect_outputs(json_file, inputs=[model])
    plan = from_flags(UpcyclePlan, flags)
    with plain_folder(model, beside=out) as folder, Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("upcycling", total=None)
        report = run(folder, out, plan, lambda done, total: progress.update(task, completed=done, total=total))
    if json_file is not None:
        write_json(json_file, {"model": str(model), "out": str(out), **report})
    typer.echo(
        f"{out}: {report['family']}, {report['num_experts']} experts of width {report['expert_width']}, "
        f"{report['num_experts_per_tok']} per token; {report['parameters']:,} parameters "
        f"({report['active_parameters']:,} active), of {report['dense_parameters']:,}"
    )
