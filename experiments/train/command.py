"""`expertier train`; what needs torch is imported when it runs."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from routing.ground.expect import expect_not_an_input

from .interrupt import hint_when_interrupted
from .presets import PRESETS, preset


def train(
    out: Annotated[Path, typer.Option(help="Folder of the run.")],
    preset_name: Annotated[str, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}.")] = "demo",
    router: Annotated[
        str | None, typer.Option(help="A router, or a variant of `compare`; the preset's own without it.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Text file, folder, .jsonl or .parquet; the standard library without it.")
    ] = None,
    column: Annotated[str, typer.Option(help="Text column of a table.")] = "text",
    tokenizer: Annotated[str | None, typer.Option(help="Folder of a Hugging Face tokenizer; bytes without it.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; the preset's own without it.")] = None,
    seed: Annotated[int, typer.Option(help="Of initialisation and data order.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    backend: Annotated[Literal["torch", "jax"], typer.Option(help="What computes.")] = "torch",
    mesh: Annotated[str | None, typer.Option(help="jax: devices per axis, such as data=2,expert=4.")] = None,
) -> None:
    """Train a small mixture-of-experts model; safe to kill, `--resume` continues bit by bit.

    Example: `expertier train --preset smoke --out runs/smoke`
    """
    from ..variants.catalogue import model_overrides
    from .corpus import copy_tokenizer, load_corpus

    if backend == "jax":
        from .jax_run import train as train_jax

        run = partial(train_jax, mesh=mesh)
    elif mesh is not None:
        raise ValueError("--mesh is for --backend jax")
    else:
        from .torch_run import train as run

    expect_not_an_input(out, *(Path(source) for source in (data, tokenizer) if source))
    config = replace(preset(preset_name), seed=seed)
    if steps is not None:
        config = replace(config, steps=steps)
    if router is not None:
        config = replace(config, model=model_overrides(router, config.model))
    with hint_when_interrupted(f"{out} keeps what was done; the same command with --resume continues"):
        result = run(config, load_corpus(data, column=column, tokenizer=tokenizer), out, resume=resume)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, out)
    typer.echo(
        f"{out}: {result.steps} steps, {result.held_out_bits_per_byte:.3f} bits per byte on held-out text, "
        f"{result.tokens_per_second:.0f} tokens/s"
    )
