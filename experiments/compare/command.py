"""`expertier compare`; what needs torch is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from ..train.interrupt import hint_when_interrupted
from ..train.presets import PRESETS, TrainConfig, fitting_model, preset, with_steps


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
        base = with_steps(base, steps)
    names = [name.strip() for name in routers.split(",") if name.strip()]
    names = _all_fitting(base) if names == ["all"] else names
    with hint_when_interrupted(f"{out} keeps what was done; the same command continues"):
        report = run(names, base, out, seeds=seeds, data=data, processes=processes)
    print_table(report["variants"])
    if json_file:
        write_json(json_file, report)
    if record:
        typer.echo(f"record: {record_comparison(report, slug)}")
    typer.echo(f"report: {(out / 'compare.html').resolve()}")
    if not any(row["seeds"] for row in report["variants"]):
        raise RuntimeError("no run finished; the reasons are above")


def _all_fitting(base: TrainConfig) -> list[str]:
    """Every router variant that fits a preset; what does not is named."""
    from ..variants.catalogue import VARIANTS

    fitting = []
    for name in VARIANTS:
        try:
            fitting_model(name, base.model)
            fitting.append(name)
        except ValueError as error:
            typer.echo(f"left out: {error}", err=True)
    return fitting
