"""`expertier train`, `compare` and `demo`: the commands; what they do needs torch and is imported when they run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from .presets import PRESETS, TrainConfig, preset


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
    from .compare_variants import model_overrides
    from .corpus import copy_tokenizer, load_corpus

    if backend == "jax":
        from .train_jax import train as train_jax

        run = partial(train_jax, mesh=mesh)
    elif mesh is not None:
        raise ValueError("--mesh is for --backend jax")
    else:
        from .train import train as run

    config = replace(preset(preset_name), seed=seed)
    if steps is not None:
        config = replace(config, steps=steps)
    if router is not None:
        config = replace(config, model=model_overrides(router, config.model))
    with _hint_when_interrupted(f"{out} keeps what was done; the same command with --resume continues"):
        result = run(config, load_corpus(data, column=column, tokenizer=tokenizer), out, resume=resume)
    if tokenizer is not None:
        copy_tokenizer(tokenizer, out)
    typer.echo(
        f"{out}: {result.steps} steps, {result.held_out_bits_per_byte:.3f} bits per byte on held-out text, "
        f"{result.tokens_per_second:.0f} tokens/s"
    )


def compare(
    routers: Annotated[
        str,
        typer.Option(help="Variants or routers, with commas between them; `all` for the routers that fit the preset."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the comparison; call again to continue it.")],
    preset_name: Annotated[str, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}.")] = "routers",
    data: Annotated[
        str | None, typer.Option(help="Text file, folder, .jsonl or .parquet; the standard library without it.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per variant.")] = 2,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; the preset's own without it.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time; they share the cores.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the report there.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the runs under experiments/records.")] = False,
    slug: Annotated[str, typer.Option(help="What the record is called, behind the date.")] = "router-comparison",
) -> None:
    """Train the same model with several routers and seeds, and report loss, cost, balance and how well experts cache.

    Example: `expertier compare --routers top2,rmoe,pregate-1 --preset routers --out runs/compare`
    """
    from routing.ground.files import write_json

    from .compare import compare as run
    from .compare import print_table, record_comparison

    if json_file and not json_file.parent.is_dir():
        raise ValueError(f"--json {json_file}: there is no folder {json_file.parent}")
    base = preset(preset_name)
    if steps is not None:
        base = replace(base, steps=steps, warmup_steps=min(base.warmup_steps, steps))
    names = [name.strip() for name in routers.split(",") if name.strip()]
    names = _all_fitting(base) if names == ["all"] else names
    with _hint_when_interrupted(f"{out} keeps what was done; the same command continues"):
        report = run(names, base, out, seeds=seeds, data=data, processes=processes)
    print_table(report["variants"])
    if json_file:
        write_json(json_file, report)
    if record:
        typer.echo(f"record: {record_comparison(report, slug)}")
    typer.echo(f"report: {(out / 'compare.html').resolve()}")
    if not any(row["seeds"] for row in report["variants"]):
        raise RuntimeError("no run finished; the reasons are above")


@contextmanager
def _hint_when_interrupted(hint: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(hint, err=True)
        raise


def _all_fitting(base: TrainConfig) -> list[str]:
    """Every router variant that fits a preset; what does not is named."""
    from .compare_runs import fitting_model
    from .compare_variants import VARIANTS

    fitting = []
    for name in VARIANTS:
        try:
            fitting_model(name, base.model)
            fitting.append(name)
        except ValueError as error:
            typer.echo(f"left out: {error}", err=True)
    return fitting


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

    report = run_demo(out, data=data, train_seconds=train_seconds)
    typer.echo(f"report: {report.resolve()}")
