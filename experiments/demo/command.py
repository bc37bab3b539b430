"""`expertier demo`."""

from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_not_an_input

from ..train.text.documents import expect_data
from .folder import expect_free


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model, the trace, the plan and the report.")] = Path(
        "runs/demo"
    ),
    data: Annotated[str | None, typer.Option(help="Text to train on; default: the standard library.")] = None,
    train_seconds: Annotated[float, typer.Option(min=1, help="About how long training may take.")] = 240.0,
) -> None:
    """Train a model, run it with its experts on the SSD, record its routing, place it on a cluster; ends with a page.

    Example: `expertier demo`
    """
    expect_data(data)
    if data is not None and data != "stdlib":
        expect_not_an_input(out, Path(data))
    expect_free(out)
    from .demo import run_demo

    report = run_demo(out, data=data, train_seconds=train_seconds)
    typer.echo(f"report: {report.resolve()}")
