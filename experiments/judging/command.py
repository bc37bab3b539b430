"""`expertier judge`; what needs torch is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from routing.ground.expect import expect_outputs, expect_there
from routing.ground.terminal import plain_console

from ..train.options import DataOption, JsonOption, TokenizerOption
from ..train.text.chosen import Text


def judge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    data: DataOption = None,
    column: Annotated[str, typer.Option(help="Text column of a table.")] = "text",
    tokenizer: TokenizerOption = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the items of the tasks.")] = 0,
    json_file: JsonOption = None,
) -> None:
    """Score a trained model on held-out text: bits per byte by domain, and two tasks that small models can fail.

    Example: `expertier judge runs/smoke`
    """
    expect_there(run)
    expect_outputs(json_file, inputs=[data, run])
    text = None if data is None else Text(data=data, column=column, tokenizer=tokenizer)
    if text is not None:
        text.expect_there()
    from routing.ground.files import write_json

    from .judge import judge as score

    found = score(run, text, seed=seed)
    console = plain_console()
    domains = Table("held-out text", "bits/byte ↓")
    for name, bits in found["domains"].items():
        domains.add_row(name, f"{bits:.3f}")
    tasks = Table("task", "right ↑", "95 %", "chance", "items")
    for name, row in found["tasks"].items():
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        tasks.add_row(name, f"{row['share']:.3f}", interval, f"{row['chance']:.3f}", str(row["trials"]))
    console.print(domains, tasks)
    if json_file:
        write_json(json_file, found)
