"""`expertier pack`: copy the experts of a model into one file of aligned records, as they are or quantised."""

from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_folder
from routing.ground.quantity import format_size
from routing.ground.terminal import plain_console

from .low_bit.options import LowBitOptions
from .options import Model, expect_model, quiet_transformers, with_options


def index_of(out: Path) -> Path:
    """The index that is written beside a packed copy."""
    return out.with_name(f"{out.name}.json")


@with_options(LowBitOptions)
def pack(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="The file to write; its index goes beside it, as FILE.json.")],
    compress: Annotated[
        bool,
        typer.Option("--compress", help="Lossless: bfloat16 weights take 30 % less on disk and in RAM."),
    ] = False,
    form: Annotated[
        str | None,
        typer.Option(
            "--form",
            help="plain expands quantised experts. int8, int4, int3, int2, mxfp4, fp8, planes, residual and ternary "
            "quantise plain ones (lossy). "
            "Default: as the checkpoint stores them.",
        ),
    ] = None,
    bundle: Annotated[
        bool,
        typer.Option(
            "--bundle",
            help="Of a model whose hidden units can be zero (ReLU): its feed-forwards, or its experts, row by row and "
            "column by column, so that a token's units alone are read.",
        ),
    ] = False,
    *,
    options: LowBitOptions,
) -> None:
    """Copy all experts of a model into one file of aligned, checksummed records; resumes if it was interrupted.

    Only an earlier packed copy of the same model is overwritten.

    Example: `expertier pack my-model --out my-model.experts --compress`

    Or `expertier pack my-model --out my-model.int4 --form int4 --method gptq --calibrate book.txt`

    Or, of a model with ReLU: `expertier pack my-model --out my-model.units --bundle`
    """
    expect_model(model)
    expect_folder(out)
    if compress and form not in (None, "compressed"):
        raise ValueError(f"--compress is short for --form compressed; got --form {form} as well, give one of them")
    if options.json_file is not None and options.json_file.resolve() in (out.resolve(), index_of(out).resolve()):
        raise ValueError(f"--json {options.json_file} is a file of the packed copy itself; give another name")
    options.expect_usable(form, is_compressed=compress)
    if bundle and (compress or form is not None):
        raise ValueError("--bundle copies the weights of feed-forwards as they are; leave out --compress and --form")
    from rich.progress import Progress

    quiet_transformers()
    if bundle:
        _pack_units(model, out)
        return
    if options.quantises(model, form):
        from .low_bit.packing import pack_low_bit

        pack_low_bit(model, out, form, options)
        return
    console = plain_console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading the checkpoint", total=None)
        from ..store.packing import write_pack

        write_pack(
            model,
            out,
            is_compressed=compress,
            form=form,
            progress=lambda done, total: progress.update(task, completed=done, total=total, description="packing"),
        )
    console.print(f"experts packed in {out}, {format_size(out.stat().st_size)}", soft_wrap=True)


def _pack_units(model: str, out: Path) -> None:
    """Write the feed-forwards or the experts of a model by units."""
    from rich.progress import Progress

    console = plain_console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("reading the checkpoint", total=None)
        from ..neurons.packing import pack_units

        pack_units(
            model, out, lambda done, total: progress.update(task, completed=done, total=total, description="packing")
        )
    console.print(f"units packed in {out}, {format_size(out.stat().st_size)}", soft_wrap=True)
