"""`expertier refactor`: a dense model cut into experts by domain."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from routing.ground.expect import expect_new, expect_outputs
from routing.ground.files import write_json

from ..flags import from_flags, with_flags
from .refactor import RefactorPlan, RouterSize
from .refactor import refactor as run
from .training import Rounds


@with_flags(RefactorPlan, Rounds, RouterSize)
def refactor(
    model: Annotated[Path, typer.Argument(metavar="DENSE_DIR", help="A small dense Llama-type checkpoint folder.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist yet.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report as JSON.")] = None,
    **flags: Any,
) -> None:
    """Cut a dense model into experts by domain, with one router over token ids for all layers (Read-ME).

    Example: `expertier refactor tiny-llama --data code.txt --data prose.txt --keep 0.5 --out tiny-experts`
    """
    expect_new(out)
    expect_outputs(json_file, inputs=[model, *flags["texts"]])
    rounds = from_flags(Rounds, flags)
    options = from_flags(RouterSize, flags).options
    plan = from_flags(RefactorPlan, flags, rounds=rounds, router_options=options)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("refactoring", total=rounds.rounds * (rounds.router_steps + rounds.expert_steps))
        report = run(model, out, plan, lambda: progress.advance(task))
    if json_file is not None:
        write_json(json_file, {"model": str(model), "out": str(out), **report})
    typer.echo(
        f"{out}: {report['domains']} experts; feed-forwards store {report['stored_of_dense']:.2f} and compute "
        f"{report['active_of_dense']:.2f} of the dense model's; held-out loss {report['loss_dense']:.4f} dense, "
        f"{report['loss_sliced']:.4f} sliced, {report['loss_after']:.4f} after {rounds.rounds} rounds (nats per token)"
    )
