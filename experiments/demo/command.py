"""`expertier demo`."""

from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_not_an_input, expect_there


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model, the trace, the plan and the report.")] = Path(
        "runs/demo"
    ),
    data: Annotated[str | None, typer.Option(help="Text to train on; the standard library without it.")] = None,
    train_seconds: Annotated[float, typer.Option(min=1, help="About how long training may take.")] = 240.0,
) -> None:
    """Train a model, run it with its experts on the SSD, record its routing, place it on a cluster; ends with a page.

    Example: `expertier demo`
    """
    from .demo import run_demo

    if data is not None and data != "stdlib":
        expect_there(data)
        expect_not_an_input(out, Path(data))
    report = run_demo(out, data=data, train_seconds=train_seconds)
    typer.echo(f"report: {report.resolve()}")
