"""`expertier compare`; what needs torch is imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer

from routing.ground.expect import expect_outputs

from ..train.description.config import TrainConfig
from ..train.fitting import fitting_model
from ..train.interrupt import hint_when_interrupted
from ..train.options import (
    ColumnOption,
    ConfigOption,
    DataOption,
    EngineOption,
    JsonOption,
    ProcessesOption,
    SetOption,
    StepsOption,
    TokenizerOption,
)
from .sweep_command import BaseOption, described_base, read_rates

RoutersOption = Annotated[
    str, typer.Option(help="Variants or routers, with commas between them; `all` for the routers that fit the preset.")
]
MarginOption = Annotated[
    float | None, typer.Option(help="Bits per byte within which variants count as equal; stated before the runs.")
]


def compare(
    routers: RoutersOption,
    out: Annotated[Path, typer.Option(help="Folder of the comparison; call again to continue it.")],
    preset_name: BaseOption = None,
    config_file: ConfigOption = None,
    settings: SetOption = None,
    data: DataOption = None,
    column: ColumnOption = None,
    tokenizer: TokenizerOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs per variant.")] = 3,
    rates: Annotated[Path | None, typer.Option(help="A sweep.json, for a learning rate of each variant's own.")] = None,
    margin: MarginOption = None,
    steps: StepsOption = None,
    processes: ProcessesOption = 1,
    engine: EngineOption = "local",
    json_file: JsonOption = None,
    record: Annotated[bool, typer.Option("--record", help="Keep the runs under experiments/records.")] = False,
    slug: Annotated[str, typer.Option(help="What the record is called, behind the date.")] = "router-comparison",
) -> None:
    """Train the same model with several routers and seeds, and report loss, cost, balance and how well experts cache.

    Example: `expertier compare --routers top2,rmoe,pregate-1 --preset routers --out runs/compare`
    """
    expect_outputs(json_file, inputs=[data, config_file, rates])
    said = {"data": data, "column": column, "tokenizer": tokenizer, "steps": steps}
    found = described_base(out, preset_name, config_file, settings, said)
    base, text = found.config, found.text
    own_rates = None if rates is None else read_rates(rates)
    from routing.ground.files import write_json

    from .compare import compare as run
    from .compare import print_table, record_comparison

    names = [name.strip() for name in routers.split(",") if name.strip()]
    names = _all_fitting(base) if names == ["all"] else names
    with hint_when_interrupted(f"{out} keeps what was done; the same command continues"):
        report = run(
            names,
            base,
            out,
            seeds=seeds,
            data=text.data,
            column=text.column,
            tokenizer=text.tokenizer,
            processes=processes,
            engine=engine,
            rates=own_rates,
            margin=margin,
        )
    print_table(report["variants"], report["warnings"])
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
