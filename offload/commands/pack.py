"""`expertier pack`: copy the experts of a model into one file of aligned records."""

from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_folder
from routing.ground.quantity import format_size
from routing.ground.terminal import plain_console

from .options import Model, expect_model, quiet_transformers


def pack(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="The file to write; its index goes beside it, as FILE.json.")],
    compress: Annotated[
        bool,
        typer.Option("--compress", help="Lossless: bfloat16 weights take 30 % less on disk and in RAM."),
    ] = False,
    form: Annotated[
        str | None,
        typer.Option("--form", help="plain expands quantised experts. Default: as the checkpoint stores them."),
    ] = None,
) -> None:
    """Copy all experts of a model into one file of aligned, checksummed records; resumes if it was interrupted.

    Only an earlier packed copy of the same model is overwritten.

    Example: `expertier pack my-model --out my-model.experts --compress`
    """
    expect_model(model)
    expect_folder(out)
    if compress and form not in (None, "compressed"):
        raise ValueError(f"--compress is short for --form compressed; got --form {form} as well, give one of them")
    from rich.progress import Progress

    console = plain_console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading the checkpoint", total=None)
        from ..store.packing import write_pack

        quiet_transformers()
        write_pack(
            model,
            out,
            is_compressed=compress,
            form=form,
            progress=lambda done, total: progress.update(task, completed=done, total=total, description="packing"),
        )
    console.print(f"experts packed in {out}, {format_size(out.stat().st_size)}", soft_wrap=True)
