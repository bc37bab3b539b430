"""`expertier dequantise`: write a quantised checkpoint as a plain one."""

from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_new
from routing.ground.terminal import plain_console

from .options import Model, expect_model


def dequantise(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="The folder to write; must not exist.")],
    dtype: Annotated[
        str, typer.Option("--dtype", help="bfloat16, float16, float32, or auto: the dtype that config.json names.")
    ] = "auto",
) -> None:
    """Write the plain checkpoint that a quantised one or a dense GGUF file stands for; resumes if it was interrupted.

    Offloading reads quantised checkpoints as they are. The copy is for other programs, and for comparing.

    Example: `expertier dequantise my-model-fp8 --out my-model`
    """
    expect_model(model)
    expect_new(out)
    from rich.progress import Progress

    console = plain_console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("writing", total=None)
        from ..formats.plain_copy import dequantise as write

        write(model, out, dtype=dtype, progress=lambda done, total: progress.update(task, completed=done, total=total))
    console.print(f"plain checkpoint written to {out}", soft_wrap=True)
