"""`expertier compare`; what needs torch is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_not_an_input, expect_outputs

from ..train.fitting import fitting_model
from ..train.interrupt import hint_when_interrupted
from ..train.options import DataOption, JsonOption, StepsOption, TokenizerOption
from ..train.presets import PRESETS, TrainConfig, preset, with_steps
from ..train.text.documents import expect_data
from ..train.text.tokens import expect_tokenizer

RoutersOption = Annotated[
    str, typer.Option(help="Variants or routers, with commas between them; `all` for the routers that fit the preset.")
]


def compare(
    routers: RoutersOption,
    out: Annotated[Path, typer.Option(help="Folder of the comparison; call again to continue it.")],
    preset_name: Annotated[str, typer.Option("--preset", help=f"One of {', '.join(PRESETS)}.")] = "routers",
    data: DataOption = None,
    column: Annotated[str, typer.Option(help="Text column of a table.")] = "text",
    tokenizer: TokenizerOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per variant.")] = 2,
    steps: StepsOption = None,
    processes: Annotated[int, typer.Option(min=1, help="Runs at a time; they share the cores.")] = 1,
    json_file: JsonOption = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the runs under experiments/records.")] = False,
    slug: Annotated[str, typer.Option(help="What the record is called, behind the date.")] = "router-comparison",
) -> None:
    """Train the same model with several routers and seeds, and report loss, cost, balance and how well experts cache.

    Example: `expertier compare --routers top2,rmoe,pregate-1 --preset routers --out runs/compare`
    """
    expect_outputs(json_file, inputs=[data])
    expect_not_an_input(out, *([Path(data)] if data else []))
    expect_data(data)
    expect_tokenizer(tokenizer)
    base = preset(preset_name)
    if steps is not None:
        base = with_steps(base, steps)
    from routing.ground.files import write_json

    from .compare import compare as run
    from .compare import print_table, record_comparison

    names = [name.strip() for name in routers.split(",") if name.strip()]
    names = _all_fitting(base) if names == ["all"] else names
    with hint_when_interrupted(f"{out} keeps what was done; the same command continues"):
        report = run(names, base, out, seeds=seeds, data=data, column=column, tokenizer=tokenizer, processes=processes)
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
